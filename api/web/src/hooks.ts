/**
 * Small things that several parts of the page use of React. Must not know: conversations, the server's answers.
 */
import { useCallback, useEffect, useState, useSyncExternalStore } from "react";
import { keep, recall } from "./browser";

/** Whether a media query holds, now and later. */
export function useMedia(query: string): boolean {
  const subscribe = useCallback(
    (listener: () => void) => {
      const list = window.matchMedia(query);
      list.addEventListener("change", listener);
      return () => list.removeEventListener("change", listener);
    },
    [query],
  );
  return useSyncExternalStore(subscribe, () => window.matchMedia(query).matches);
}

/** Whether somebody may be looking at the page. */
export function useIsVisible(): boolean {
  const subscribe = useCallback((listener: () => void) => {
    document.addEventListener("visibilitychange", listener);
    return () => document.removeEventListener("visibilitychange", listener);
  }, []);
  return useSyncExternalStore(subscribe, () => !document.hidden);
}

/** A switch that this browser remembers. */
export function useKept(name: string, first: () => boolean): [boolean, (value: boolean) => void] {
  const [value, set] = useState(() => (recall(name) === null ? first() : recall(name) === "true"));
  const change = (next: boolean): void => {
    keep(name, String(next));
    set(next);
  };
  return [value, change];
}

/** The time, every second while it is wanted. */
export function useClock(isOn: boolean): number {
  const [now, set] = useState(Date.now);
  useEffect(() => {
    if (!isOn) return;
    set(Date.now());
    const timer = setInterval(() => set(Date.now()), 500);
    return () => clearInterval(timer);
  }, [isOn]);
  return now;
}

/** A sentence that goes away by itself. */
export function useSaid(ms = 6000): [string | null, (sentence: string | null) => void] {
  const [said, say] = useState<string | null>(null);
  useEffect(() => {
    if (said === null) return;
    const timer = setTimeout(() => say(null), ms);
    return () => clearTimeout(timer);
  }, [said, ms]);
  return [said, say];
}
