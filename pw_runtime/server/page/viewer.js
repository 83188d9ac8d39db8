// SPDX-License-Identifier: Apache-2.0
/** A clip in full, in a loop; beside it the draft that it was painted over. */

import { address } from "./api.js";
import { setText } from "./dom.js";
import * as words from "./words.js";

const dialog = document.getElementById("viewer");
const film = dialog.querySelector("video");
const fault = dialog.querySelector(".error");
const swap = dialog.querySelector("[aria-pressed]");
let shown = null; // the job

/** Open the viewer with a job's clip, or with its draft where there is no clip yet. */
export function showFilm(video) {
  shown = video;
  const done = video.status === "completed" && !video.draft_only;
  setText(dialog.querySelector(".prompt"), video.prompt);
  setText(dialog.querySelector(".facts"), words.factWords(video));
  film.style.aspectRatio = (video.size ?? "16x9").replace("x", " / ");
  swap.hidden = !done || !video.draft_ready;
  load(done ? "video" : "draft");
  dialog.showModal();
}

function load(variant) {
  const isDraft = variant === "draft";
  setText(fault, "");
  setText(dialog.querySelector("h2"), isDraft ? "Draft" : "Clip");
  swap.setAttribute("aria-pressed", String(isDraft));
  film.ariaLabel = `${isDraft ? "Draft" : "Clip"}: ${words.shortened(shown.prompt)}`;
  const at = film.currentTime;
  film.src = address(shown.id, `/content?variant=${variant}`);
  film.currentTime = at; // draft and clip at the same moment
  film.play().catch(() => {}); // refused by the browser's settings: its controls are there
}

swap.addEventListener("click", () => {
  load(swap.getAttribute("aria-pressed") === "true" ? "video" : "draft");
});
film.addEventListener("error", () => {
  if (dialog.open) setText(fault, "The file cannot be played here; it can be downloaded.");
});
dialog.addEventListener("close", () => {
  film.pause();
  film.removeAttribute("src");
  film.load(); // closes its connection
});
