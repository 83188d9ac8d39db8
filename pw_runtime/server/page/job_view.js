// SPDX-License-Identifier: Apache-2.0
/** One job: its picture, where it is, and what can be done with it. */

import { address, cancelVideo, createVideo, deleteVideo, newKey, readReceipt } from "./api.js";
import { confirmed, showReceipt } from "./dialogs.js";
import { copy, setText } from "./dom.js";
import { Film } from "./film.js";
import * as words from "./words.js";

/** The element of a job and what keeps it true. `page` has reuse, submitted, removed, finishes. */
export class JobView {
  constructor(page) {
    const { root, parts } = copy("job");
    this.element = root;
    this.page = page;
    this.parts = parts;
    this.film = new Film(parts);
    this.#listen();
  }

  /** Show the job's state; in a gallery, the prompt stands once above all. */
  update(video, inGallery = this.inGallery) {
    this.video = video;
    this.inGallery = inGallery;
    const { parts } = this;
    parts.prompt.id = `prompt-${video.id}`;
    parts.article.setAttribute("aria-labelledby", parts.prompt.id);
    const active = words.isActive(video);
    setText(parts.prompt, video.prompt);
    setText(parts.facts, this.inGallery ? words.seedWords(video) : words.factWords(video));
    this.element.classList.toggle("tile", this.inGallery);
    this.element.classList.toggle("bare", this.#isBare());
    this.element.dataset.status = words.cancelled(video) ? "cancelled" : video.status;
    setText(parts.stage, words.stageWords(video));
    setText(parts.left, this.#leftWords());
    parts.progress.hidden = video.status !== "in_progress";
    parts.progress.value = video.progress ?? 0;
    parts.progress.ariaLabel = `Progress of ${words.shortened(video.prompt)}`;
    this.#showFault();
    parts.cancel.hidden = !active;
    parts.delete.hidden = active;
    parts.download.hidden = parts.receipt.hidden = video.status !== "completed";
    parts.download.href = address(video.id, this.#isDraft() ? "/content?variant=draft" : "/content");
    if (!active) parts.cancel.disabled = false;
    this.#showFinishes();
    this.film.update(video);
  }

  /** A job with nothing to see, now or soon, takes a row instead of a picture's height. */
  #isBare() {
    const { status, draft_ready } = this.video;
    return !draft_ready && (status === "queued" || status === "failed") && !this.inGallery;
  }

  #leftWords() {
    const { video } = this;
    if (video.status === "completed" && video.completed_at) {
      const kept = video.expires_at ? `kept until ${words.clockWords(video.expires_at)}` : "";
      return [words.clockWords(video.completed_at), kept].filter(Boolean).join(" · ");
    }
    if (video.status !== "in_progress") return "";
    return [`${video.progress ?? 0} %`, words.leftWords(video.seconds_left)].filter(Boolean).join(" · ");
  }

  #isDraft() {
    return this.video.draft_only || this.video.status !== "completed";
  }

  /** A draft that nothing paints any more can be finished at any preset that fits. */
  #showFinishes() {
    const { parts, video } = this;
    const isDraft = video.status === "failed" || this.page.endsWithDraft(video);
    const possible = video.draft_ready && isDraft && !words.isActive(video);
    const names = possible ? this.page.finishes(video) : [];
    parts.finish.hidden = names.length === 0;
    const select = parts["finish-preset"];
    if ([...select.options].map((option) => option.value).join() === names.join()) return;
    const chosen = select.value || video.preset;
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    if (names.includes(chosen)) select.value = chosen;
  }

  #listen() {
    const { parts } = this;
    parts.cancel.addEventListener("click", () => this.#cancel());
    parts.receipt.addEventListener("click", () => this.#receipt());
    parts.reuse.addEventListener("click", () => this.page.reuse(this.video));
    parts.delete.addEventListener("click", () => this.#delete());
    parts.finish.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#finish();
    });
  }

  async #cancel() {
    const question = {
      title: "Cancel this clip?",
      text: "What is computed since its draft is lost. A draft that is ready is kept.",
      yes: "Cancel the clip",
    };
    if (this.video.status === "in_progress" && !(await confirmed(question))) return;
    this.parts.cancel.disabled = true;
    await this.#attempt(async () => this.page.changed(await cancelVideo(this.video.id)));
    this.parts.cancel.disabled = false;
  }

  async #delete() {
    const question = {
      title: "Delete this clip?",
      text: "Its files go too: the clip, its draft and its receipt.",
      yes: "Delete",
    };
    if (!(await confirmed(question))) return;
    await this.#attempt(async () => {
      await deleteVideo(this.video.id);
      this.page.removed(this.video.id);
    });
  }

  async #receipt() {
    await this.#attempt(async () => {
      const receipt = await readReceipt(this.video.id);
      showReceipt(receipt, address(this.video.id, "/receipt"), `receipt-${this.video.id}.json`);
    });
  }

  #finishKey = { preset: "", key: "" };

  async #finish() {
    const preset = this.parts["finish-preset"].value;
    if (this.#finishKey.preset !== preset) this.#finishKey = { preset, key: newKey() };
    await this.#attempt(async () => {
      const made = await createVideo({ draft_id: this.video.id, preset }, this.#finishKey.key);
      this.#finishKey = { preset: "", key: "" };
      this.page.submitted(made);
    });
  }

  /** Do what was asked for; a refusal is shown on the card, in the server's words. */
  async #attempt(action) {
    this.#refusal = "";
    try {
      await action();
    } catch (error) {
      this.#refusal = error.message;
      this.page.announce(error.message);
      if (error.status === 401) this.page.locked();
    }
    this.#showFault();
  }

  #refusal = ""; // of the last thing that was asked for

  #showFault() {
    const { video } = this;
    const failed = video.status === "failed" && !words.cancelled(video);
    const reason = failed ? (video.error?.message ?? "The server gave no reason.") : "";
    setText(this.parts.error, this.#refusal || reason);
  }
}
