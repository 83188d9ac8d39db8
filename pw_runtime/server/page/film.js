// SPDX-License-Identifier: Apache-2.0
/** The picture of a job: nothing, then its draft in motion, then a still of the clip. */

import { address } from "./api.js";
import { setText } from "./dom.js";
import { showFilm } from "./viewer.js";
import * as words from "./words.js";

const calm = matchMedia("(prefers-reduced-motion: reduce)");
const previews = new Set();
const RETRY = 2_000; // ms before a picture that did not load is asked for again
let still = remembered() ?? calm.matches;

// A preview is fetched when it first comes onto the screen, and moves only there.
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    target.dataset.seen = isIntersecting ? "yes" : "no";
    if (isIntersecting && !target.hasAttribute("src")) target.src = target.dataset.address;
    move(target);
  }
});

/** Wire the button that holds all previews still; the choice is remembered. */
export function wireMotion(button) {
  button.setAttribute("aria-pressed", String(still));
  button.addEventListener("click", () => {
    still = !still;
    button.setAttribute("aria-pressed", String(still));
    try {
      localStorage.setItem("previews", still ? "still" : "moving");
    } catch {
      // holds until the page is left
    }
    previews.forEach(move);
  });
}

function remembered() {
  try {
    const choice = localStorage.getItem("previews");
    return choice && choice === "still";
  } catch {
    return null; // storage is switched off
  }
}

function move(preview) {
  if (still || preview.dataset.seen !== "yes") preview.pause();
  else preview.play().catch(() => {}); // refused by the browser's settings: it stays still
}

/** The picture in a job's card; a click opens it in full. */
export class Film {
  #parts;
  #variant = null; // shown: "draft", "video" or null
  #brokenAt = null; // a load failed then: the server may have been away
  #video; // the job

  constructor(parts) {
    this.#parts = parts;
    parts.open.addEventListener("click", () => showFilm(this.#video));
    parts.preview.addEventListener("error", () => this.#fail("draft"));
    parts.still.addEventListener("error", () => this.#fail("video"));
  }

  /** Show a newer state of the job. */
  update(video) {
    this.#video = video;
    const done = video.status === "completed" && !video.draft_only;
    const variant = done ? "video" : video.draft_ready ? "draft" : null;
    this.#parts.screen.style.aspectRatio = (video.size ?? "16x9").replace("x", " / ");
    this.#parts.open.ariaLabel = `Play the ${done ? "clip" : "draft"}: ${words.shortened(video.prompt)}`;
    if (variant === null) this.#nothing(words.isActive(video) ? "The draft appears here" : "No picture");
    else if (variant !== this.#variant || this.#mayRetry()) this.#show(variant);
    this.#variant = variant;
  }

  #mayRetry() {
    return this.#brokenAt !== null && performance.now() - this.#brokenAt > RETRY;
  }

  /** The draft is not shown, for now; of a clip only the still is missing, and it opens all the same. */
  #fail(variant) {
    if (variant !== this.#variant) return;
    if (variant === "draft") this.#nothing("The draft cannot be shown here.");
    else this.#parts.still.hidden = true;
    this.#brokenAt = performance.now();
  }

  /** Forget the preview: the job is gone. */
  close() {
    this.#stop();
  }

  #show(variant) {
    this.#brokenAt = null;
    const { open, blank, badge, preview, still: image } = this.#parts;
    const isDraft = variant === "draft";
    open.hidden = false;
    blank.hidden = true;
    badge.hidden = preview.hidden = !isDraft;
    image.hidden = isDraft;
    if (isDraft) {
      preview.dataset.address = address(this.#video.id, "/content?variant=draft");
      previews.add(preview);
      watcher.observe(preview);
    } else {
      this.#stop();
      image.src = address(this.#video.id, "/content?variant=thumbnail");
    }
  }

  #nothing(why) {
    this.#stop();
    this.#parts.open.hidden = true;
    this.#parts.blank.hidden = false;
    setText(this.#parts.blank, why);
  }

  #stop() {
    const { preview } = this.#parts;
    if (!previews.delete(preview)) return;
    watcher.unobserve(preview);
    preview.pause();
    preview.removeAttribute("src");
    preview.load(); // closes its connection
  }
}
