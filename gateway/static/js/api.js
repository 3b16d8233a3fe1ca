// The server's API, as far as the page uses it. The key lives here, in memory, and nowhere else.

let key = "";

export function setKey(value) {
  key = value.trim();
}

/** What went wrong; `code` is the server's, or "network" if it did not answer. */
export class ApiError extends Error {
  constructor(message, code, param = null) {
    super(message);
    this.code = code;
    this.param = param;
  }
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Check that Headrace is still running.", "network");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw failure(body.error, `The server answered with status ${response.status}.`);
}

function failure(error, otherwise) {
  return new ApiError(error?.message || otherwise, error?.code || "error", error?.param);
}

/** The models that are served now. */
export async function models() {
  return (await (await call("/v1/models")).json()).data;
}

/** The server's version. */
export async function version() {
  return (await (await call("/health")).json()).version;
}

/**
 * Stream a chat completion: `onChunk` gets every chunk. Aborting the signal closes the connection, which cancels the
 * request on the server; it shows as an AbortError.
 */
export async function streamChat(body, { signal, onChunk }) {
  const response = await call("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    }),
    signal,
  });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw failure(chunk.error, "The server ended the answer with an error.");
      onChunk(chunk);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke before the answer was complete.", "network");
  }
  throw new ApiError("The connection ended before the answer was complete.", "network");
}

/** The data of server-sent events; comments and other fields are skipped. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}
