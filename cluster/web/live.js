// A view that the server sends every second. Rests while nobody looks, comes back after failures.

const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 30_000;

export class Live {
  #api;
  #show;
  #refused;
  #controller = null;
  #wanted = false;

  /** `show(view)` is called with each view; `refused()` once if this caller may not look. */
  constructor(api, { show, refused }) {
    this.#api = api;
    this.#show = show;
    this.#refused = refused;
    document.addEventListener("visibilitychange", () => this.#update());
  }

  /** Whether there is anybody to look, as far as the page's layout goes. */
  want(wanted) {
    this.#wanted = wanted;
    this.#update();
  }

  /** After a new key. */
  again() {
    this.#controller?.abort();
    this.#controller = null;
    this.#update();
  }

  #update() {
    const shall = this.#wanted && !document.hidden;
    if (shall && !this.#controller) {
      this.#controller = new AbortController();
      this.#run(this.#controller.signal);
    } else if (!shall && this.#controller) {
      this.#controller.abort();
      this.#controller = null;
    }
  }

  async #run(signal) {
    let wait = FIRST_WAIT_MS;
    while (!signal.aborted) {
      try {
        for await (const view of this.#api.live(signal)) {
          if (signal.aborted) return;
          wait = FIRST_WAIT_MS;
          this.#show(view);
        }
      } catch (error) {
        if (signal.aborted) return;
        if (error.status === 401 || error.status === 403) {
          this.#refused();
          return;
        }
      }
      await this.#look(signal);
      await pause(wait, signal);
      wait = Math.min(2 * wait, LONGEST_WAIT_MS);
    }
  }

  /** One look without a stream: some proxies let none through. */
  async #look(signal) {
    try {
      const view = await this.#api.cluster(signal);
      if (!signal.aborted) this.#show(view);
    } catch {
      // The next attempt may work.
    }
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
