/** Who speaks, and to which gateway. */
export interface Options {
  /** The gateway's base URL, ends with /v1. Default: "/v1" of the page's own origin. */
  url?: string;
  /** Who speaks, where no token says it. The gateway keeps a pseudonym. */
  user?: string;
  /** An API key. Not for browsers, which have tokens. */
  key?: string;
}

/** An answer: its `id`, and the `x-understudy-feedback-token` that came with it. One of the two is enough. */
export interface About {
  responseId?: string;
  token?: string;
}

/** What the gateway takes beside kind and value. */
export interface More {
  user?: string;
  name?: string;
  text?: string;
  value?: unknown;
  target?: unknown;
  /** Sent again, it counts once. */
  event_id?: string;
  /** Unix seconds. */
  at?: number;
  response_id?: string;
  trace_id?: string;
  session_id?: string;
  token?: string;
}

export interface Votes {
  thumb(up: boolean, more?: More): string;
  /** 1 to 5. */
  rate(value: number, more?: More): string;
  /** The answer as it should have been. */
  correct(text: string, more?: More): string;
  /** Ids of answers. */
  compare(winner: string, loser: string, more?: More): string;
  /** Any kind that the gateway knows. Returns the event's id. */
  send(kind: string, more?: More): string;
}

export interface Answer extends Votes {
  /** For an app's own copy button. `share` of the answer, 0 to 1. */
  copied(share?: number, part?: "whole" | "part" | "code"): void;
  accept(more?: More): void;
  /** The answer is no longer shown. */
  stop(): void;
}

export interface Client extends Votes {
  /** Hear copies, edits in place, dwell and the first action. `about` may be a promise while an answer streams. */
  observe(element: HTMLElement, about: About | Promise<About>): Answer;
  /** Send what waits. Resolves to whether nothing is left to send. */
  flush(): Promise<boolean>;
}

export function connect(options?: Options): Client;
