// SPDX-License-Identifier: Apache-2.0
/** Say jobs, stages, times and sizes in words. */

const STAGES = {
  loading: "Loading the model",
  text: "Reading the prompt",
  encode: "Reading the picture",
  draft: "Draft",
  highres: "High resolution",
  decode: "Decoding",
};

const UNITS = { draft: "step", highres: "step", decode: "frame" };

/** Return a job's status in a few words: "Draft, step 12 of 50". */
export function stageWords(video) {
  if (video.status === "queued") return queueWords(video.queue_position);
  if (video.status === "completed") return video.draft_only ? "Draft finished" : "Finished";
  if (video.status === "failed") return cancelled(video) ? "Cancelled" : "Failed";
  const unit = UNITS[video.stage];
  if (!unit || !(video.steps > 1)) return runningWords(video);
  const current = Math.min(Math.floor(video.step ?? 0) + 1, video.steps);
  return `${runningWords(video)}, ${unit} ${current} of ${video.steps}`;
}

function runningWords(video) {
  if (video.stage === "decode" && !video.draft_ready) return "Decoding the draft";
  return STAGES[video.stage] ?? video.stage ?? "Starting";
}

/** Return a stage change as a screen reader should say it; no steps, no percents. */
export function spokenChange(before, after) {
  if (after.status === "failed") {
    if (before.status === "failed") return "";
    return cancelled(after) ? "cancelled" : `failed: ${after.error?.message ?? "no reason given"}`;
  }
  if (after.status !== before.status && after.status !== "in_progress") return stageWords(after);
  const said = [];
  if (after.draft_ready && !before.draft_ready) said.push("draft ready");
  if (after.status === "in_progress" && after.stage !== before.stage && after.stage) {
    said.push(runningWords(after));
  }
  return said.join(", ");
}

function queueWords(before) {
  if (before === null || before === undefined) return "Waiting";
  return before === 0 ? "Waiting, next in the queue" : `Waiting, ${before} before it`;
}

/** Return true for a job that a person ended. */
export function cancelled(video) {
  return video.status === "failed" && video.error?.code === "cancelled";
}

/** Return true while a job may still change by itself. */
export function isActive(video) {
  return video.status === "queued" || video.status === "in_progress";
}

/** Return a job's fixed facts: "2k · 2560 × 1440 · 5 s · seed 7". */
export function factWords(video) {
  return [presetFacts(video), seedWords(video)].filter(Boolean).join(" · ");
}

/** Return the facts that all jobs of one prompt share. */
export function presetFacts(video) {
  const seconds = Number(video.seconds);
  const length = seconds > 0 ? `${trimmed(seconds)} s` : "";
  return [video.preset, sizeWords(video.size), length].filter(Boolean).join(" · ");
}

/** Return "seed 7". */
export function seedWords(video) {
  return Number.isSafeInteger(video.seed) ? `seed ${video.seed}` : "seed: in the receipt"; // > 2^53
}

/** Return "2560 × 1440" for "2560x1440". */
export function sizeWords(size) {
  return (size ?? "").replace("x", "\u00a0×\u00a0");
}

/** Return a duration as far as one wants to know it: "about 3 min left". */
export function leftWords(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "";
  if (seconds < 10) return "a few seconds left";
  if (seconds < 60) return `about ${Math.ceil(seconds / 10) * 10} s left`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `about ${minutes} min left`;
  return `about ${Math.floor(minutes / 60)} h ${minutes % 60} min left`;
}

/** Return a moment (seconds since 1970) as the reader's clock shows it; with the day if not today. */
export function clockWords(seconds) {
  const moment = new Date(seconds * 1000);
  const today = moment.toDateString() === new Date().toDateString();
  const time = moment.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  return today ? time : `${moment.toLocaleDateString([], { day: "numeric", month: "short" })}, ${time}`;
}

/** Return a number with at most one decimal: 5, 1.4. */
export function trimmed(number) {
  return String(Math.round(number * 10) / 10);
}

/** Return the beginning of a text, cut at a word. */
export function shortened(text, most = 60) {
  if (text.length <= most) return text;
  const cut = text.slice(0, most);
  return `${cut.slice(0, Math.max(cut.lastIndexOf(" "), most / 2))} …`;
}
