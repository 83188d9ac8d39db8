// SPDX-License-Identifier: Apache-2.0
/** Dialogs: a question, a receipt, the token. Escape closes the first two. */

import { openSession } from "./api.js";
import { setText } from "./dom.js";

/** Ask a question; true where it was answered with yes. */
export function confirmed({ title, text, yes }) {
  const dialog = document.getElementById("confirm");
  const button = dialog.querySelector("[value=yes]");
  setText(dialog.querySelector("h2"), title);
  setText(dialog.querySelector("p"), text);
  setText(button, yes);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** Show a receipt, which is text. */
export function showReceipt(receipt, address, name) {
  const dialog = document.getElementById("receipt");
  setText(dialog.querySelector("pre"), receipt);
  const link = dialog.querySelector("a");
  link.href = address;
  link.download = name;
  dialog.showModal();
}

/** Ask for the token until the server takes one; then call back. */
export function askToken(opened) {
  const dialog = document.getElementById("token");
  if (dialog.open) return;
  const field = document.getElementById("token-value");
  const fault = dialog.querySelector(".error");
  dialog.addEventListener("cancel", (event) => event.preventDefault()); // there is nothing behind it
  dialog.querySelector("form").onsubmit = async (event) => {
    event.preventDefault();
    setText(fault, "");
    try {
      await openSession(field.value);
    } catch (error) {
      setText(fault, error.message);
      field.select();
      return;
    }
    field.value = "";
    dialog.close();
    opened();
  };
  dialog.showModal();
}
