// SPDX-License-Identifier: Apache-2.0
/** Templates of index.html, filled in. Text only ever becomes text: nothing here reads markup. */

/** Return a copy of a template's first element and its parts by the name in data-part. */
export function copy(name) {
  const root = document.getElementById(`${name}-template`).content.firstElementChild.cloneNode(true);
  const parts = {};
  for (const node of root.querySelectorAll("[data-part]")) parts[node.dataset.part] = node;
  return { root, parts };
}

/** Set an element's text, only where it differs: a live region speaks at every change. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Make `nodes` the children of `parent`, in this order, moving as few as possible. */
export function arrange(parent, nodes) {
  const wanted = new Set(nodes);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  nodes.forEach((node, index) => {
    if (parent.children[index] !== node) move(parent, node, parent.children[index] ?? null);
  });
}

/** Put a node before another; it keeps the focus, and a video in it goes on playing. */
function move(parent, node, before) {
  const focused = node.contains(document.activeElement) ? document.activeElement : null;
  if (node.isConnected && parent.isConnected && "moveBefore" in parent) {
    parent.moveBefore(node, before);
  } else {
    parent.insertBefore(node, before);
  }
  if (focused && document.activeElement !== focused) focused.focus({ preventScroll: true });
}
