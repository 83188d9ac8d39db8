// SPDX-License-Identifier: Apache-2.0
/** The page: a form, the jobs, and the connection between them and the server. */

import { listModels, listPresets, readTrouble } from "./api.js";
import { askToken } from "./dialogs.js";
import { setText } from "./dom.js";
import { wireMotion } from "./film.js";
import { Form } from "./form.js";
import { Live } from "./live.js";
import { Queue } from "./queue.js";
import * as words from "./words.js";

const BANNERS = {
  live: "",
  polling: "No live updates here: the page asks every three seconds.",
  lost: "Connection lost, trying again. What runs on the server goes on.",
  locked: "",
};
const TROUBLE = 2_000; // ms before one asks again whether clips are made
let presets = [];
let knowsServer = false;
let watch = 0; // timer

const page = {
  /** Speak a stage change to screen readers. */
  announce: (text) => setText(document.getElementById("announcer"), text),
  /** Show the running job's progress in the title of the tab. */
  counted(running) {
    document.title = running ? `${running.progress} % · PixelWizard` : "PixelWizard";
  },
  /** Return the names of the presets that a job's draft can be finished at. */
  finishes: (video) => presets.filter((preset) => finishes(preset, video)).map(({ id }) => id),
  /** Tell whether a job's video is its draft. */
  endsWithDraft: (video) => video.draft_only || presetOf(video)?.has_highres === false,
  queueMoved: () => live.refreshSoon(),
  changed: (video) => queue.one(video),
  removed: (id) => queue.gone(id),
  reuse: (video) => form.reuse(video),
  submitted(video) {
    queue.one(video);
    queue.reveal(video.id);
    page.announce(`${words.shortened(video.prompt, 40)}: ${words.stageWords(video)}`);
    live.refresh(); // its siblings
  },
  locked: () => askToken(() => live.refresh()),
};
const queue = new Queue(page);
const form = new Form(page);
const live = new Live({
  all: (videos, fresh) => queue.all(videos, fresh),
  one: (video) => queue.one(video),
  gone: (id) => queue.gone(id),
  state,
});

/** A draft is finished at presets whose own drafts are made alike. */
function finishes(preset, video) {
  const own = presetOf(video);
  const alike =
    own && preset.draft_size === own.draft_size && preset.steps.draft === own.steps.draft;
  return preset.has_highres && preset.fits !== false && alike;
}

function presetOf(video) {
  return presets.find(({ id }) => id === video.preset);
}

function state(name) {
  const banner = document.getElementById("connection");
  setText(banner, BANNERS[name]);
  banner.classList.toggle("shown", BANNERS[name] !== "");
  if (name === "locked") page.locked();
  if (name === "lost") knowsServer = false; // another one may come back, with other presets
  if (name !== "live" && name !== "polling") return;
  if (!knowsServer) greet();
  watchWorkers();
}

/** Say why no clip is made, until one would be; only then it is known which presets fit. */
async function watchWorkers() {
  clearTimeout(watch);
  try {
    const trouble = await readTrouble();
    setText(document.getElementById("trouble"), trouble && `Clips wait: ${trouble}`);
    if (trouble) watch = setTimeout(watchWorkers, TROUBLE);
    else if (presets.some(({ fits }) => fits === null)) {
      greet();
      watch = setTimeout(watchWorkers, TROUBLE); // another device may still be starting
    }
  } catch {
    // the listing says that the server is away
  }
}

/** Ask the server for what does not change while it runs. */
async function greet() {
  knowsServer = true;
  try {
    const [models, found] = await Promise.all([listModels(), listPresets()]);
    setText(document.getElementById("model"), models.map(({ id }) => id).join(", "));
    if (JSON.stringify(found) === JSON.stringify(presets)) return; // leave the focus where it is
    presets = found;
    form.presets(found);
    queue.refresh();
  } catch (error) {
    knowsServer = false;
    presets = [];
    form.noPresets(error.message);
  }
}

wireMotion(document.getElementById("motion"));
live.refresh();
