// What one answer did, forward by forward: made from the chunks of its stream, read by the canvas and the figures.

const isWritten = (token) => token.state === "committed" || token.state === "edited";

export class Recording {
  // `places`: masks asked for, null = not known here. `before`, `after`: text around the answer.
  constructor({ before, after, places }) {
    this.before = before;
    this.after = after;
    this.places = places;
    this.text = "";
    this.frames = [];
    this.usage = null;
    this.finish = null;
    this.started = performance.now();
    this.ended = null;
  }

  add(chunk) {
    const choice = chunk.choices[0];
    if (chunk.fewstep?.canvas) this.addCanvas(chunk.fewstep.canvas);
    if (choice) {
      this.text += choice.text ?? choice.delta?.content ?? "";
      this.finish = choice.finish_reason ?? this.finish;
    }
    this.usage = chunk.usage ?? this.usage;
  }

  addCanvas({ revision, start, tokens }) {
    const last = this.frames.at(-1);
    // A canvas shows one block. The blocks before it are as their last revision left them.
    const done = !last ? [] : last.start === start ? last.done : [...last.done, ...last.tokens].slice(0, start);
    const earlier = last && last.start === start ? last.tokens : [];
    const marked = tokens.map((token, index) => mark(token, earlier[index], revision));
    // A block that became shorter has an end of sequence: nothing follows it.
    const isShorter = tokens.length < earlier.length;
    const over = isShorter || Boolean(last && last.start === start && last.over);
    const numWritten = done.length + marked.filter(isWritten).length;
    const numEdits = (last?.numEdits ?? 0) + marked.filter((token) => token.edited === revision).length;
    this.frames.push({ revision, start, tokens: marked, done, over, numWritten, numEdits, time: performance.now() });
  }

  end() {
    this.ended = performance.now();
  }

  get isDone() {
    return this.finish !== null;
  }

  // Steps of the scrubber: every revision, and the finished text behind them.
  get numSteps() {
    return this.frames.length + (this.isDone ? 1 : 0);
  }

  get whole() {
    return this.before + this.text + this.after;
  }

  // Tokens and masks as step `index` shows them; what follows the live block as a number of masks.
  step(index) {
    const frame = this.frames[index];
    if (!frame) return { tokens: this.final(), numAhead: 0, revision: this.frames.length };
    const shown = frame.start + frame.tokens.length;
    const numAhead = frame.over || this.places === null ? 0 : Math.max(0, this.places - shown);
    return { tokens: [...frame.done, ...frame.tokens], numAhead, revision: frame.revision };
  }

  // The finished text, by tokens as far as they spell it: a stop string may have cut it within one.
  final() {
    const last = this.frames.at(-1);
    const tokens = last ? [...last.done, ...last.tokens].filter(isWritten) : [];
    const kept = [];
    let length = 0;
    for (const token of tokens) {
      const text = this.text.slice(length, length + token.text.length);
      if (!token.text.startsWith(text)) return [{ text: this.text, state: "committed" }];
      if (text) kept.push({ ...token, text });
      length += text.length;
    }
    return length === this.text.length ? kept : [{ text: this.text, state: "committed" }];
  }

  // Written tokens and forwards at step `index`.
  count(index) {
    const frame = this.frames[index] ?? this.frames.at(-1);
    if (!frame) return { numTokens: 0, numForwards: 0, numEdits: 0 };
    const isEnd = !this.frames[index] && this.usage;
    return {
      numTokens: isEnd ? this.usage.completion_tokens : frame.numWritten,
      numForwards: isEnd ? this.usage.fewstep.forwards : frame.revision,
      numEdits: frame.numEdits,
    };
  }

  // Seconds that a forward took on the average, between the first canvas and the last; null with fewer than two.
  get forwardSeconds() {
    const [first, last] = [this.frames[0], this.frames.at(-1)];
    if (this.frames.length < 2 || last.time <= first.time) return null;
    return (last.time - first.time) / 1000 / (this.frames.length - 1);
  }

  // Tokens per second if a forward wrote one token: the same first wait, forwards that took as long; null = not known yet.
  get oneEachRate() {
    const { numTokens } = this.count(this.numSteps - 1);
    const forward = this.forwardSeconds;
    if (forward === null || !numTokens) return null;
    const first = (this.frames[0].time - this.started) / 1000;
    return numTokens / (first + (numTokens - 1) * forward);
  }

  // Seconds from the request to its end, or until now.
  get seconds() {
    return ((this.ended ?? performance.now()) - this.started) / 1000;
  }
}

// A token with the revision that wrote it, the one that edited it last, and what it replaced.
function mark(token, earlier, revision) {
  if (!isWritten(token)) return token;
  const found = { ...token, written: earlier?.written ?? revision };
  if (token.state === "edited") {
    const isNew = !earlier || earlier.state !== "edited" || earlier.text !== token.text;
    found.edited = isNew ? revision : earlier.edited;
    found.was = isNew ? earlier?.text : earlier.was;
  }
  return found;
}
