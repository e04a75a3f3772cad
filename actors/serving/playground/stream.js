// The server's HTTP API: models, token counts, and one diffusing stream.

export class ServerError extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

let apiKey = "";

export function setKey(key) {
  apiKey = key;
}

async function call(path, body, signal) {
  const headers = {};
  if (apiKey) headers.authorization = `Bearer ${apiKey}`;
  if (body) headers["content-type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
  if (body) options.body = JSON.stringify(body);
  const response = await fetch(path, options);
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let message = `${response.status} ${response.statusText}`.trim();
  try {
    message = (await response.json()).error.message || message;
  } catch {
    // Not OpenAI's error shape: something in front of the server has answered. The status line says what there is to say.
  }
  return new ServerError(response.status, message, response.headers.get("retry-after"));
}

export async function models() {
  const list = await (await call("v1/models")).json();
  return list.data.map((model) => model.id);
}

// Tokens that the text `part` takes behind `before`: what both take less what the first takes.
export async function countTokens(model, before, part, signal) {
  const count = async (prompt) => (await (await call("tokenize", { model, prompt }, signal)).json()).count;
  const [both, first] = await Promise.all([count(before + part), count(before)]);
  return Math.max(1, both - first);
}

// The chunks of a stream, each as `data:` carried it, until `[DONE]`.
export async function* chunks(path, body, signal) {
  const response = await call(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError(0, "the stream broke off before its end");
    waiting += value;
    let end;
    while ((end = waiting.indexOf("\n\n")) >= 0) {
      const data = waiting.slice(0, end).replace(/^data: /, "");
      waiting = waiting.slice(end + 2);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(0, chunk.error.message);
      yield chunk;
    }
  }
}
