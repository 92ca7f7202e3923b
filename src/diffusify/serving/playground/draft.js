// The history of a text. A frame is the text after one step; a track is all frames of one candidate (one length of the
// masked spans); a version is all tracks of one request, or of a manual edit. Finished versions do not change, so undo
// goes back to the previous one.

const OPEN = Object.freeze({ id: null, text: "", kind: "open" });

export class Draft {
  versions = [];
  current = -1;
  step = 0;

  get version() {
    return this.versions[this.current];
  }

  get frames() {
    return this.version?.tracks[this.version.track] ?? [];
  }

  get last() {
    return this.frames.length - 1;
  }

  get tokens() {
    return this.frames[this.step]?.tokens ?? [];
  }

  get text() {
    return this.tokens.map(({ text }) => text).join("");
  }

  push(version) {
    this.versions = [...this.versions.slice(0, this.current + 1), version];
    this.move(1);
  }

  /** Goes to the previous version (-1) or the next one (1). */
  move(by) {
    if (!this.versions[this.current + by]) return;
    this.current += by;
    this.step = this.last;
  }

  show(track) {
    this.version.track = track;
    this.step = this.last;
  }

  /** Applies an event of the server. `sent` are the tokens of the request, which have more fields than those returned. */
  receive(version, { event, data }, sent, seconds) {
    const following = this.step === this.last;
    if (event === "canvas") {
      version.tracks[data.candidate] = [{ tokens: data.tokens.map(withFieldsOf(sent)), written: 0, forwards: 0, seconds }];
      version.length = data.tokens.length;
      if (this.version !== version) this.push(version);
    } else if (event === "denoise") {
      const track = version.tracks[data.candidate];
      track.push(nextFrame(track.at(-1), data, seconds));
    } else if (data.usage) {
      version.track = version.kept = data.choices[0]?.candidate ?? version.track;
      this.frames.splice(-1, 1, lastFrame(this.frames, data, seconds));
    }
    if (following) this.step = this.last;
  }

  /** Replaces the shown tokens; later steps are dropped until the edit is undone. */
  edit(tokens) {
    const frames = [...this.frames.slice(0, this.step), { ...this.frames[this.step], tokens }];
    this.push({ ...this.version, tracks: [frames], track: 0, length: Math.max(this.version.length, tokens.length) });
  }

  /** Replaces a token by an alternative or the user's own text. */
  replace(position, tokens) {
    this.edit(this.tokens.toSpliced(position, 1, ...tokens.map(pinnedFrom)));
  }

  pin(positions, pinned) {
    this.edit(this.tokens.map((token, i) => (positions.has(i) && token.id !== null ? { ...token, pinned } : token)));
  }

  /** The tokens with some of them masked. */
  mask(drop) {
    return this.tokens.map((token, i) => (drop(token, i) ? OPEN : token));
  }

  /** The tokens with everything masked from the first open or dropped one on, for autoregressive models. */
  maskFrom(drop) {
    const first = this.tokens.findIndex((token, i) => token.id === null || drop(token, i));
    const kept = first < 0 ? this.tokens : this.tokens.slice(0, first);
    return [...kept, ...Array(Math.max(this.version.length, this.tokens.length) - kept.length).fill(OPEN)];
  }
}

function pinnedFrom({ id, text, probability }) {
  if (id === null) return OPEN;
  return { id, text, kind: probability === undefined ? "given" : "written", confidence: probability, pinned: true };
}

const withFieldsOf = (sent) => (token, i) => (token.id === null ? OPEN : token.id === sent?.[i]?.id ? sent[i] : token);

function nextFrame(frame, { step, forwards, write, erase, expand = [], delete: gone = [] }, seconds) {
  const tokens = frame.tokens.flatMap((token, i) => (gone.includes(i) ? [] : expand.includes(i) ? [OPEN, OPEN] : [token]));
  const revised = write.filter(({ position }) => tokens[position]?.kind === "written");
  for (const position of erase) tokens[position] = OPEN;
  for (const { position, ...token } of write) {
    while (tokens.length < position) tokens.push(OPEN);
    tokens[position] = { ...token, kind: "written", step };
  }
  return { tokens, written: frame.written + write.length - revised.length - erase.length, forwards, seconds };
}

/** The final answer: its tokens, or those of a continuation up to its end. */
function lastFrame(frames, { choices: [choice], usage }, seconds) {
  const [first, last] = [frames[0].tokens, frames.at(-1).tokens];
  const given = first.filter(({ id }) => id !== null).length;
  const tokens = choice?.tokens?.map(withFieldsOf(last)) ?? last.slice(0, given + usage.completion_tokens);
  return { tokens, written: usage.completion_tokens, forwards: usage.forwards, seconds };
}
