// Requests to the server, and the same requests as code for other programs.

let key = sessionStorage.getItem("key");

export function setKey(value) {
  key = value;
  sessionStorage.setItem("key", value);
}

export class APIError extends Error {
  constructor({ message, param }, status) {
    super(message);
    this.param = param;
    this.status = status;
  }
}

async function send(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  const response = await fetch(path, options).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server does not respond.");
  });
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new APIError(answer?.error ?? { message: `${response.status} ${response.statusText}` }, response.status);
}

export async function request(path, body, signal) {
  return (await send(path, body, signal)).json();
}

/** The events of a streamed request. Step events have a name; the final answer has none. */
export async function* streamEvents({ path, body }, signal) {
  const response = await send(path, { ...body, stream: true, denoise: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The server closed the connection before the text was finished.");
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const field = (name) => block.match(new RegExp(`^${name}: ?(.*)$`, "m"))?.[1];
      const [event, text] = [field("event"), field("data")];
      if (text === "[DONE]") return;
      if (!text) continue;
      const data = JSON.parse(text);
      if (data.error) throw new APIError(data.error);
      yield { event, data };
    }
  }
}

export function asCurl({ path, body }) {
  const lines = [`curl ${location.origin}${path}`, "-H 'Content-Type: application/json'"];
  if (key) lines.push('-H "Authorization: Bearer $DIFFUSIFY_KEY"');
  lines.push(`-d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`);
  return lines.join(" \\\n  ");
}

const OPENAI_FIELDS = new Set(["model", "prompt", "max_tokens", "temperature", "seed"]); // parameters of OpenAI's client

export function asPython({ path, body }) {
  body = JSON.parse(JSON.stringify(body)); // without undefined fields
  const secret = key ? 'os.environ["DIFFUSIFY_KEY"]' : '"none"';
  const head = `${key ? "import os\n\n" : ""}from openai import OpenAI\n
client = OpenAI(base_url="${location.origin}/v1", api_key=${secret})\n`;
  if (path !== "/v1/completions") {
    return `import httpx\n${head}answer = client.post("${path.slice(3)}", cast_to=httpx.Response, body=${python(body)})
print(answer.json()["choices"][0]["text"])\n`;
  }
  const extra = Object.entries(body).filter(([name]) => !OPENAI_FIELDS.has(name));
  const lines = Object.entries(body).filter(([name]) => OPENAI_FIELDS.has(name)).map(([name, value]) => `${name}=${python(value)}`);
  if (extra.length) lines.push(`extra_body=${python(Object.fromEntries(extra))}`);
  return `${head}answer = client.completions.create(\n${lines.map((line) => `    ${line},\n`).join("")})
print(answer.choices[0].text)\n`;
}

function python(value) {
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, item]) => `"${name}": ${python(item)}`).join(", ")}}`;
}
