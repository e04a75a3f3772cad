// Wires the page: what is asked, what is shown, and the keyboard.

import { draw, follow, selectionIn } from "./canvas.js";
import { Controls } from "./controls.js";
import { Recording } from "./recording.js";
import { chunks, countTokens, models, ServerError, setKey } from "./stream.js";

const REPLAY_MS = 140;
const byId = (id) => document.getElementById(id);
const [prompt, canvas, scrubber] = [byId("prompt"), byId("canvas"), byId("scrubber")];
const controls = new Controls();

let recording = null;
let running = null; // the AbortController of the request that is under way
let replaying = null; // the timer of a replay
let selection = null; // {source, start, end}: what an infill would replace
let retry = null; // what to do once a key is there

const isOn = (button) => button.getAttribute("aria-disabled") !== "true";
const turn = (id, on) => byId(id).setAttribute("aria-disabled", String(!on));
const isChat = () => byId("mode-chat").checked;

function say(text) {
  byId("status").textContent = text;
  byId("error").textContent = "";
}

function complain(text) {
  byId("status").textContent = "";
  byId("error").textContent = text;
}

// ---- asking

async function run(hole = null) {
  if (!byId("form").reportValidity()) return;
  if (!byId("model").value) {
    await loadModels();
    if (!byId("model").value) return;
  }
  stop();
  pause();
  const controller = (running = new AbortController());
  turn("stop", true);
  turn("keep", false);
  turn("copy", false);
  say("Running…");
  const earlier = recording;
  let own = null;
  try {
    const asked = await request(hole, controller.signal);
    own = recording = new Recording(asked.around);
    scrubber.value = scrubber.max;
    refresh(own);
    for await (const chunk of chunks(asked.path, asked.body, controller.signal)) {
      own.add(chunk);
      schedule(own);
    }
    own.end();
    finished(own, asked.body);
  } catch (error) {
    own?.end();
    // What was refused has shown nothing; the answer before it stays.
    if (own && own === recording && !own.frames.length) restore(earlier);
    failed(error, controller, () => run(hole));
  } finally {
    if (running === controller) {
      running = null;
      turn("stop", false);
      if (recording) refresh(recording);
    }
  }
}

async function request(hole, signal) {
  const model = byId("model").value, fields = controls.fields();
  const shared = { model, stream: true, diffusing: true, stream_options: { include_usage: true }, ...fields };
  const limit = controls.number("max-tokens");
  const limited = limit === null ? {} : { max_tokens: limit };
  if (isChat()) {
    const body = { ...shared, ...limited, messages: [{ role: "user", content: prompt.value }] };
    return { path: "v1/chat/completions", body, around: { before: "", after: "", places: limit } };
  }
  if (!hole) {
    const body = { ...shared, ...limited, prompt: prompt.value };
    return { path: "v1/completions", body, around: { before: prompt.value, after: "", places: limit } };
  }
  const [before, removed, after] = [
    prompt.value.slice(0, hole.start),
    prompt.value.slice(hole.start, hole.end),
    prompt.value.slice(hole.end),
  ];
  const places = controls.number("hole") ?? (await countTokens(model, before, removed, signal));
  const body = { ...shared, prompt: before, max_tokens: places };
  if (after) body.suffix = after;
  return { path: "v1/completions", body, around: { before, after, places } };
}

function finished(own, body) {
  const { numTokens, numForwards } = own.count(own.numSteps - 1);
  const seed = body.temperature > 0 ? ` Seed ${body.seed}.` : "";
  const why = own.finish === "length" ? "The length was reached" : "Done";
  say(`${why}: ${plural(numTokens, "token")} in ${plural(numForwards, "forward")}, ${own.seconds.toFixed(2)} s.${seed}`);
  turn("keep", true);
  turn("copy", true);
}

function restore(earlier) {
  recording = earlier;
  scrubber.value = scrubber.max;
  if (!earlier) canvas.replaceChildren();
  for (const id of ["keep", "copy"]) turn(id, Boolean(earlier?.isDone));
}

function failed(error, controller, again) {
  if (controller.signal.aborted) {
    if (running === controller || running === null) say("Stopped. What was written so far stays on the canvas.");
  } else if (error instanceof ServerError && error.status === 401) {
    complain("The server wants an API key.");
    askForKey(error.message, again);
  } else if (error instanceof ServerError && error.status === 429) {
    const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : " Try again later.";
    complain(`The server is busy: ${error.message}.${wait}`);
  } else if (error instanceof ServerError) {
    complain(`The server refused: ${error.message}`);
  } else {
    complain("The server does not answer. Is it still running?");
  }
}

function stop() {
  if (!running) return;
  running.abort();
  running = null;
  turn("stop", false);
}

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

async function loadModels() {
  try {
    const names = await models();
    byId("model").replaceChildren(...names.map((name) => new Option(name, name)));
    say("Ready.");
  } catch (error) {
    failed(error, new AbortController(), loadModels);
  }
}

function askForKey(words, again) {
  retry = again;
  byId("open-key").hidden = false;
  byId("key-words").textContent = `The server says: ${words}`;
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
  byId("key").select();
}

// ---- showing

let scheduled = false;

// Chunks may come faster than the screen is drawn.
function schedule(own) {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    if (own === recording) refresh(own);
  });
}

function refresh(own) {
  const last = Math.max(0, own.numSteps - 1);
  // Whoever has gone back to look at an earlier step is left there while the answer goes on.
  const place = Number(scrubber.value) < Number(scrubber.max) ? Number(scrubber.value) : last;
  scrubber.max = String(last);
  scrubber.disabled = own.numSteps < 2;
  turn("play", own.numSteps > 1 && !running);
  show(place);
  if (running && place === last) follow(canvas);
}

function show(index) {
  scrubber.value = String(index);
  draw(canvas, recording, index);
  const { numTokens, numForwards, numEdits } = recording.count(index);
  const isEnd = recording.isDone && index === recording.numSteps - 1;
  const words = !recording.frames.length ? "no forwards yet" : `forward ${numForwards}${running && !isEnd ? "" : ` of ${total()}`}${isEnd ? ", done" : ""}`;
  byId("place").textContent = words;
  scrubber.setAttribute("aria-valuetext", words);
  figures(numTokens, numForwards, numEdits);
  offer();
}

function total() {
  return recording.count(recording.numSteps - 1).numForwards;
}

function figures(numTokens, numForwards, numEdits) {
  const pace = recording.oneEachRate;
  byId("forwards").textContent = numForwards;
  byId("tokens").textContent = numTokens;
  byId("num-edits").textContent = numEdits;
  byId("tokens-per-forward").textContent = numForwards ? (numTokens / numForwards).toFixed(2) : "–";
  const all = recording.count(recording.numSteps - 1).numTokens;
  byId("tokens-per-second").textContent = all ? rate(all / recording.seconds) : "–";
  byId("autoregressive-pace").textContent = pace ? rate(pace) : "–";
  const goal = Math.max(1, recording.isDone ? all : (recording.places ?? all), all);
  for (const [id, value] of [["denoised", numTokens], ["one-each", Math.min(numForwards, goal)]]) {
    byId(id).max = goal;
    byId(id).value = value;
    byId(`${id}-value`).textContent = value;
  }
}

const rate = (value) => `${value < 100 ? value.toFixed(1) : Math.round(value)} /s`;

function replay() {
  if (replaying) return pause();
  let index = Number(scrubber.value);
  if (index >= recording.numSteps - 1) index = -1;
  byId("play").textContent = "Pause";
  replaying = setInterval(() => {
    index += 1;
    show(index);
    follow(canvas);
    if (index >= recording.numSteps - 1) pause();
  }, REPLAY_MS);
}

function pause() {
  clearInterval(replaying);
  replaying = null;
  byId("play").textContent = "Replay";
}

// ---- infill

// Whether there is a selection to fill in, and where.
function offer() {
  const inCanvas = recording?.isDone && scrubber.value === scrubber.max ? selectionIn(canvas) : null;
  if (inCanvas) selection = { source: "canvas", ...inCanvas };
  else if (prompt.selectionEnd > prompt.selectionStart) {
    selection = { source: "prompt", start: prompt.selectionStart, end: prompt.selectionEnd };
  } else selection = null;
  turn("infill", selection !== null && !isChat());
}

function infill() {
  if (isChat()) return complain("Infill continues text, so it does not go with Chat. Choose Text above the prompt.");
  if (!selection) return complain("Select the text to fill in anew first, in the prompt or on the canvas.");
  const { source, start, end } = selection;
  if (start === 0) return complain("A hole needs text before it: the model begins to read there.");
  if (source === "canvas") {
    prompt.value = recording.whole;
    document.getSelection().removeAllRanges();
  }
  prompt.setSelectionRange(start, end);
  return run({ start, end });
}

// ---- wiring

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
byId("stop").addEventListener("click", stop);
byId("infill").addEventListener("click", infill);
// Pressing the button must not undo the selection that it is about.
byId("infill").addEventListener("pointerdown", (event) => event.preventDefault());
byId("play").addEventListener("click", (event) => isOn(event.currentTarget) && replay());
scrubber.addEventListener("input", () => {
  pause();
  show(Number(scrubber.value));
});
byId("keep").addEventListener("click", (event) => {
  if (!isOn(event.currentTarget)) return;
  prompt.value = recording.whole;
  prompt.focus();
  prompt.setSelectionRange(prompt.value.length, prompt.value.length);
  say("The text of the canvas is the prompt now.");
});
byId("copy").addEventListener("click", async (event) => {
  if (!isOn(event.currentTarget)) return;
  try {
    await navigator.clipboard.writeText(recording.text);
    say("Copied.");
  } catch {
    complain("The browser does not let this page copy. Select the text instead.");
  }
});
document.addEventListener("selectionchange", offer);
for (const name of ["select", "keyup", "pointerup", "input"]) prompt.addEventListener(name, offer);
for (const id of ["mode-text", "mode-chat"]) byId(id).addEventListener("change", offer);
document.addEventListener("keydown", (event) => {
  if (byId("key-dialog").open) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape") stop();
  else if (event.altKey && event.code === "KeyI") {
    event.preventDefault();
    infill();
  }
});
byId("open-key").addEventListener("click", () => askForKey("a key is needed for models and answers.", loadModels));
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
byId("key-form").addEventListener("submit", () => {
  setKey(byId("key").value.trim());
  byId("key").value = "";
  const again = byId("model").value ? retry : loadModels;
  again();
});
window.addEventListener("pagehide", stop);

loadModels();
