// SPDX-License-Identifier: Apache-2.0
/** The form of a new clip. What is typed survives a reload of the page. */

import { createVideo, newKey } from "./api.js";
import { copy, setText } from "./dom.js";
import * as words from "./words.js";

const form = document.getElementById("new");
const fault = document.getElementById("new-error");
const button = document.getElementById("submit");
const FIELDS = { prompt: "prompt", negative_prompt: "negative", seed: "seed", n: "count" };

/** Wire the form; `submitted(video)` is called with the first job that a submission made. */
export class Form {
  #submitted;
  #locked;
  #presets = [];
  #wanted = ""; // the preset to choose, once the server has said which there are
  #key = null; // of the submission on its way: the same until it is answered or something changes

  constructor({ submitted, locked }) {
    this.#submitted = submitted;
    this.#locked = locked;
    this.#recall();
    form.addEventListener("input", () => this.#changed());
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    form.elements.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    this.#label();
  }

  /** Show the presets; one that does not fit says why and cannot be chosen. */
  presets(presets) {
    this.#presets = presets;
    const choices = presets.map((preset) => this.#choice(preset));
    form.querySelector(".choices").replaceChildren(...choices);
    this.#fit();
  }

  /** Show that the presets could not be read. */
  noPresets(message) {
    const text = document.createElement("p");
    text.className = "error";
    text.textContent = message;
    form.querySelector(".choices").replaceChildren(text);
  }

  /** Fill the form with an earlier job's prompt, preset and seed. */
  reuse(video) {
    form.elements.prompt.value = video.prompt;
    form.elements.negative_prompt.value = video.negative_prompt ?? "";
    form.elements.seed.value = Number.isSafeInteger(video.seed) ? video.seed : "";
    form.elements.n.value = 1;
    form.elements.draft_only.checked = video.draft_only;
    this.#choose(video.preset);
    this.#changed();
    form.elements.prompt.focus();
  }

  #choice(preset) {
    const { root, parts } = copy("preset");
    parts.radio.value = preset.id;
    setText(parts.name, preset.id);
    setText(parts.size, `${words.sizeWords(preset.size)} · ${preset.frames} frames`);
    return root;
  }

  /** Let presets that do not fit say why; of some, the draft fits where the clip does not. */
  #fit() {
    const draftOnly = form.elements.draft_only.checked;
    for (const radio of form.querySelectorAll("[name=preset]")) {
      const preset = this.#presets.find(({ id }) => id === radio.value);
      const fits = (draftOnly ? preset.draft_fits : preset.fits) !== false; // null: not known yet
      radio.disabled = !fits;
      if (!fits) radio.checked = false;
      const why = fits ? "" : `Does not fit: ${preset.reason ?? "more memory is needed"}`;
      setText(radio.closest(".choice").querySelector(".why"), why);
    }
    this.#choose(this.#wanted);
  }

  #choose(name) {
    const radios = [...form.querySelectorAll("[name=preset]:enabled")];
    const radio = radios.find(({ value }) => value === name) ?? radios.find(({ checked }) => checked);
    const chosen = radio ?? radios[0];
    if (chosen) chosen.checked = true;
  }

  #changed() {
    this.#key = null;
    setText(fault, "");
    for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
    this.#wanted = form.elements.preset?.value || this.#wanted;
    this.#remember();
    this.#fit();
    this.#label();
  }

  #label() {
    const count = Number(form.elements.n.value) || 1;
    const noun = form.elements.draft_only.checked ? "draft" : "clip";
    setText(form.querySelector("label[for=count]"), `Number of ${noun}s`);
    setText(button, count > 1 ? `Make ${count} ${noun}s` : `Make ${noun}`);
  }

  #fields() {
    const { elements } = form;
    const fields = { prompt: elements.prompt.value.trim(), seed: -1 };
    if (elements.negative_prompt.value.trim()) fields.negative_prompt = elements.negative_prompt.value;
    if (elements.preset?.value) fields.preset = elements.preset.value;
    if (elements.seed.value.trim()) fields.seed = Number(elements.seed.value);
    if (Number(elements.n.value) !== 1) fields.n = Number(elements.n.value);
    if (elements.draft_only.checked) fields.draft_only = true;
    return fields;
  }

  /** Return what is wrong before the server is asked: [field, words] or null. */
  #problem() {
    const { prompt, seed, n } = form.elements;
    if (!prompt.value.trim()) return ["prompt", "Write a prompt first: one scene, in a sentence or more."];
    if (!/^\d*$/.test(seed.value.trim()) || !Number.isSafeInteger(Number(seed.value))) {
      return ["seed", "A seed is a whole number from 0 to 2^53 - 1; leave it empty for a random one."];
    }
    const count = Number(n.value);
    if (!Number.isInteger(count) || count < 1 || count > Number(n.max)) {
      return ["n", `The number of drafts is a whole number from 1 to ${n.max}.`];
    }
    return null;
  }

  async #submit() {
    if (button.disabled) return;
    const problem = this.#problem();
    if (problem) return this.#refuse(...problem);
    setText(fault, "");
    button.disabled = true;
    this.#key ??= newKey();
    try {
      const video = await createVideo(this.#fields(), this.#key);
      this.#key = null;
      this.#submitted(video);
    } catch (error) {
      this.#refuse(error.param, error.message);
      if (error.status === 401) this.#locked();
    } finally {
      button.disabled = false;
    }
  }

  #refuse(param, message) {
    setText(fault, message);
    const field = document.getElementById(FIELDS[param]);
    if (!field) return;
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }

  #remember() {
    const { prompt, negative_prompt, seed, n, draft_only } = form.elements;
    const typed = {
      prompt: prompt.value, negative_prompt: negative_prompt.value, seed: seed.value, n: n.value,
      draft_only: draft_only.checked, preset: this.#wanted,
    };
    try {
      sessionStorage.setItem("form", JSON.stringify(typed));
    } catch {
      // storage is switched off: a reload then empties the form
    }
  }

  #recall() {
    let typed;
    try {
      typed = JSON.parse(sessionStorage.getItem("form"));
    } catch {
      typed = null;
    }
    if (!typed) return;
    for (const name of Object.keys(FIELDS)) form.elements[name].value = typed[name] ?? "";
    form.elements.draft_only.checked = Boolean(typed.draft_only);
    this.#wanted = typed.preset ?? "";
  }
}
