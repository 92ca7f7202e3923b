// A text and how it came to be. A frame is the text at one moment; a track is the frames of one size of the holes; a take
// is the tracks of one request, or of an edit by hand. Finished takes do not change, so undoing is going back to one.

const OPEN = Object.freeze({ id: null, text: "", kind: "open" });

export class Draft {
  takes = [];
  now = -1;
  at = 0;

  get take() {
    return this.takes[this.now];
  }

  get frames() {
    return this.take?.tracks[this.take.track] ?? [];
  }

  get last() {
    return this.frames.length - 1;
  }

  get tokens() {
    return this.frames[this.at]?.tokens ?? [];
  }

  get text() {
    return this.tokens.map(({ text }) => text).join("");
  }

  push(take) {
    this.takes = [...this.takes.slice(0, this.now + 1), take];
    this.travel(1);
  }

  /** Undoes (-1) or does again (1). */
  travel(by) {
    if (!this.takes[this.now + by]) return;
    this.now += by;
    this.at = this.last;
  }

  look(track) {
    this.take.track = track;
    this.at = this.last;
  }

  /** Takes in an event of the server. `sent` are the tokens that it was given, which know more than it says of them. */
  receive(take, { event, data }, sent, seconds) {
    const following = this.at === this.last;
    if (event === "canvas") {
      take.tracks[data.candidate] = [{ tokens: data.tokens.map(knownFrom(sent)), written: 0, forwards: 0, seconds }];
      take.room = data.tokens.length;
      if (this.take !== take) this.push(take);
    } else if (event === "denoise") {
      const track = take.tracks[data.candidate];
      track.push(nextFrame(track.at(-1), data, seconds));
    } else if (data.usage) {
      take.track = take.kept = data.choices[0]?.candidate ?? take.track;
      this.frames.splice(-1, 1, lastFrame(this.frames, data, seconds));
    }
    if (following) this.at = this.last;
  }

  /** Puts these tokens in place of the shown ones; what came later is gone until this is undone. */
  edit(tokens) {
    const frames = [...this.frames.slice(0, this.at), { ...this.frames[this.at], tokens }];
    this.push({ ...this.take, tracks: [frames], track: 0, room: Math.max(this.take.room, tokens.length) });
  }

  /** Puts alternatives or the user's own words in place of a token. */
  put(position, tokens) {
    this.edit(this.tokens.toSpliced(position, 1, ...tokens.map(pinnedFrom)));
  }

  pin(positions, pinned) {
    this.edit(this.tokens.map((token, i) => (positions.has(i) && token.id !== null ? { ...token, pinned } : token)));
  }

  /** The tokens with some of them open. */
  without(drop) {
    return this.tokens.map((token, i) => (drop(token, i) ? OPEN : token));
  }

  /** The tokens up to the first open one or one to drop, and room behind them: how a left-to-right model writes. */
  before(drop) {
    const first = this.tokens.findIndex((token, i) => token.id === null || drop(token, i));
    const kept = first < 0 ? this.tokens : this.tokens.slice(0, first);
    return [...kept, ...Array(Math.max(this.take.room, this.tokens.length) - kept.length).fill(OPEN)];
  }
}

function pinnedFrom({ id, text, probability }) {
  if (id === null) return OPEN;
  return { id, text, kind: probability === undefined ? "given" : "written", confidence: probability, pinned: true };
}

const knownFrom = (sent) => (token, i) => (token.id === null ? OPEN : token.id === sent?.[i]?.id ? sent[i] : token);

function nextFrame(frame, { step, forwards, write, erase }, seconds) {
  const tokens = [...frame.tokens];
  const anew = write.filter(({ position }) => tokens[position]?.kind === "written");
  for (const position of erase) tokens[position] = OPEN;
  for (const { position, ...token } of write) {
    while (tokens.length < position) tokens.push(OPEN);
    tokens[position] = { ...token, kind: "written", step };
  }
  return { tokens, written: frame.written + write.length - anew.length - erase.length, forwards, seconds };
}

/** What an answer says last: the tokens, or how many of a continuation come before its end. */
function lastFrame(frames, { choices: [choice], usage }, seconds) {
  const [first, now] = [frames[0].tokens, frames.at(-1).tokens];
  const given = first.filter(({ id }) => id !== null).length;
  const tokens = choice?.tokens?.map(knownFrom(now)) ?? now.slice(0, given + usage.completion_tokens);
  return { tokens, written: usage.completion_tokens, forwards: usage.forwards, seconds };
}
