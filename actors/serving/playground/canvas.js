// Draws one step of a recording.

const SHOWN_AHEAD = 256;

export function draw(canvas, recording, index) {
  const { tokens, numAhead, revision } = recording.step(index);
  const isLast = !recording.frames[index];
  const nodes = [around(recording.before, "before")];
  for (const token of tokens) nodes.push(drawn(token, isLast ? null : revision));
  for (let place = 0; place < Math.min(numAhead, SHOWN_AHEAD); place++) nodes.push(drawn({ text: "", state: "ahead" }, null));
  if (numAhead > SHOWN_AHEAD) nodes.push(around(`  and ${numAhead - SHOWN_AHEAD} more masks`, "more"));
  nodes.push(around(recording.after, "after"));
  canvas.replaceChildren(...nodes);
}

// Keep what is being written in sight, without moving the page.
export function follow(canvas) {
  const open = canvas.querySelector('[data-state="provisional"], [data-state="mask"]');
  if (!open) return;
  const [box, seen] = [open.getBoundingClientRect(), canvas.getBoundingClientRect()];
  if (box.bottom > seen.bottom || box.top < seen.top) canvas.scrollTop += box.top - seen.top - seen.height / 2;
}

function around(text, kind) {
  const node = document.createElement("span");
  node.className = kind;
  node.textContent = text;
  return node;
}

function drawn(token, revision) {
  const node = document.createElement("span");
  node.className = "token";
  node.dataset.state = token.state;
  node.textContent = token.text;
  if (!token.text) node.setAttribute("aria-hidden", "true");
  if (token.state === "provisional" && token.text.includes("\n")) node.classList.add("newline");
  if (revision !== null && (token.edited ?? token.written) === revision) node.classList.add("fresh");
  if (token.written) node.title = `written by forward ${token.written}`;
  if (token.edited) node.title += `; forward ${token.edited} replaced ${JSON.stringify(token.was ?? "")}`;
  return node;
}

// Where the selection lies in the canvas's text; null = elsewhere, or empty.
export function selectionIn(canvas) {
  const selection = document.getSelection();
  if (!selection.rangeCount || selection.isCollapsed) return null;
  const range = selection.getRangeAt(0);
  if (!canvas.contains(range.commonAncestorContainer)) return null;
  const before = document.createRange();
  before.selectNodeContents(canvas);
  before.setEnd(range.startContainer, range.startOffset);
  const start = before.toString().length;
  return { start, end: start + range.toString().length };
}
