/**
 * What the browser may or may not let a page do: keep things, copy, save a file, make ids.
 *
 * Knows: that localStorage can be forbidden or full, and that a page from plain http has neither clipboard nor randomUUID.
 * Must not know: what is kept, copied or saved.
 */

/** The storage, or null where the browser forbids it. */
export function storageOf(kind: "localStorage" | "sessionStorage"): Storage | null {
  try {
    return window[kind];
  } catch {
    return null;
  }
}

/** Small things that may be lost without harm: which theme, which panel. */
export function recall(name: string, kind: "localStorage" | "sessionStorage" = "localStorage"): string | null {
  try {
    return storageOf(kind)?.getItem(name) ?? null;
  } catch {
    return null;
  }
}

export function keep(name: string, value: string | null, kind: "localStorage" | "sessionStorage" = "localStorage"): boolean {
  try {
    if (value === null) storageOf(kind)?.removeItem(name);
    else storageOf(kind)?.setItem(name, value);
    return storageOf(kind) !== null;
  } catch {
    return false;
  }
}

export function newId(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** This tab's name: the same after a reload, another in every other tab. */
export function tabName(): string {
  const name = recall("mpgpt.tab", "sessionStorage") ?? newId();
  keep("mpgpt.tab", name, "sessionStorage");
  return name;
}

export async function copy(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyByHand(text);
  }
}

/** Over plain http there is no clipboard, but what is selected can be copied. */
function copyByHand(text: string): boolean {
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "hidden";
  document.body.append(area);
  const before = document.activeElement;
  area.select();
  try {
    return document.execCommand("copy");
  } catch {
    return false;
  } finally {
    area.remove();
    if (before instanceof HTMLElement) before.focus();
  }
}

export function save(name: string, text: string, type: string): void {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
