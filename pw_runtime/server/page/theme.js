// SPDX-License-Identifier: Apache-2.0
// Not a module: it runs before the first paint, so that no page opens in the wrong colours.
"use strict";

(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");

  /** Return the remembered choice, "dark" or "light"; null where there is none. */
  function remembered() {
    try {
      return localStorage.getItem("theme");
    } catch {
      return null; // storage is switched off: the system's choice counts
    }
  }

  /** Show a choice; null follows the system. */
  function show(theme) {
    if (theme === null) delete root.dataset.theme;
    else root.dataset.theme = theme;
    const dark = (theme ?? (system.matches ? "dark" : "light")) === "dark";
    const button = document.getElementById("theme");
    if (button) button.setAttribute("aria-pressed", String(dark));
    return dark;
  }

  show(remembered());
  document.addEventListener("DOMContentLoaded", () => {
    show(remembered());
    system.addEventListener("change", () => show(remembered()));
    document.getElementById("theme").addEventListener("click", () => {
      const next = show(remembered()) ? "light" : "dark";
      try {
        localStorage.setItem("theme", next);
      } catch {
        // shown all the same, until the page is left
      }
      show(next);
    });
  });
})();
