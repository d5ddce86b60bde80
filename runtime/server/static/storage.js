// What the browser keeps, each only after its box was ticked: the conversation and the settings in localStorage, the
// key in sessionStorage (gone with the tab). Unticking deletes at once.

const KEPT = "llmc.page";
const KEY = "llmc.key";

/** Storage may be switched off, full, or hold what someone else wrote: then it is as if nothing were kept. */
function attempt(action) {
  try {
    return action();
  } catch {
    return null;
  }
}

/** What was kept, or null. */
export function load() {
  const kept = attempt(() => JSON.parse(localStorage.getItem(KEPT)));
  return kept && typeof kept === "object" && kept.version === 1 ? kept : null;
}

/** Whether it was kept: false where storage is full or switched off. */
export function save(state) {
  const text = JSON.stringify({ version: 1, ...state });
  return attempt(() => (localStorage.setItem(KEPT, text), true)) ?? false;
}

export function forget() {
  attempt(() => localStorage.removeItem(KEPT));
}

export function loadKey() {
  return attempt(() => sessionStorage.getItem(KEY));
}

/** Keeps the key for this tab, or forgets it: null. */
export function keepKey(key) {
  attempt(() => (key === null ? sessionStorage.removeItem(KEY) : sessionStorage.setItem(KEY, key)));
}
