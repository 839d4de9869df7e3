/**
 * The page's few icons, drawn with one stroke. They are decoration: what they stand in has a name of its own.
 */
const PATHS = {
  menu: "M4 7h16M4 12h16M4 17h16",
  plus: "M12 5v14M5 12h14",
  pen: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  bin: "M5 7h14M10 7V4.5h4V7M7 7l1 12.5h8L17 7M10.5 10.5v6M13.5 10.5v6",
  out: "M12 15V4M8 8l4-4 4 4M5 14v5.5h14V14",
  into: "M12 4v11M8 11l4 4 4-4M5 14v5.5h14V14",
  page: "M6 3.5h8l4 4v13H6zM14 3.5v4h4M9 12h6M9 16h6",
  send: "M12 19V6M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 8.5h10.5V20H9zM5 15.5H4V4h10.5v1.5",
  done: "M5 12.5l4.5 4.5L19 7",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19.5 4v4h-4",
  further: "M5 12h13M13 6.5l5.5 5.5-5.5 5.5",
  sliders: "M4 8h8M18 8h2M15 5.5v5M4 16h2M12 16h8M9 13.5v5",
  ring: "M12 5.5l7 12.5H5zM12 3.2a1.9 1.9 0 1 0 .01 0M5 16a1.9 1.9 0 1 0 .01 0M19 16a1.9 1.9 0 1 0 .01 0",
  down: "M12 5v13M6.5 12.5 12 18l5.5-5.5",
  close: "M6 6l12 12M18 6 6 18",
  key: "M14.5 9.5a4 4 0 1 0-3.6 4L14 16.500h2.500V19H19v-3.500l-4.700-4.700M9.500 8.500h.01",
} as const;

export function Icon({ name }: { name: keyof typeof PATHS }) {
  return (
    <svg className="icon" viewBox="0 0 24 24" width="18" height="18" aria-hidden="true" focusable="false">
      <path d={PATHS[name]} fill="none" stroke="currentColor" strokeWidth="1.8" strokeLinecap="round" strokeLinejoin="round" />
    </svg>
  );
}
