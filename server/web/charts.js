// Bars and lines. Every chart has a twin that is a table, for those who cannot see it or want its numbers.

import { html, useEffect, useRef, useState } from "./vendor/htm-preact.standalone.module.js";
import { MAX_COLOURS } from "./drivers.js";

/** A bar for a part of one. Its number stands beside it, so it is hidden from screen readers. */
export function Bar({ part, colour = 0 }) {
  const width = Math.max(0, Math.min(1, part || 0));
  return html`<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">
    <rect class="track" width="100" height="10" /><rect class="fill member${colour % MAX_COLOURS}" width=${100 * width} height="10" />
  </svg>`;
}

/** A small line without axes: the last values of something. */
export function Sparkline({ values, label }) {
  const most = Math.max(...values, 1e-9);
  const points = values.map((value, index) => `${(100 * index) / Math.max(1, values.length - 1)},${29 - (28 * value) / most}`);
  return html`<svg class="sparkline" viewBox="0 0 100 30" preserveAspectRatio="none" role="img" aria-label=${label}>
    <polyline points=${points.join(" ")} /></svg>`;
}

const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 5], [1, 4], [12, 3], [3, 2, 3, 6]]; // lines differ without colour

/**
 * Lines over the places of tokens, drawn by uPlot. `series`: [{label, values}]; `at`: the place to mark, and
 * `onPoint(place | null)` tells where the mouse is.
 */
export function Lines({ places, series, at, onPoint, range = [0, 1], height = 220 }) {
  const box = useRef(null);
  const plot = useRef(null);
  const told = useRef(onPoint);
  told.current = onPoint;
  const shape = series.map((one) => one.label).join("\n");
  useEffect(() => {
    const style = getComputedStyle(box.current);
    const ink = style.getPropertyValue("--ink").trim();
    const grid = { stroke: style.getPropertyValue("--line").trim(), width: 1 };
    const axis = { stroke: ink, grid, ticks: grid };
    let isOver = false;
    const options = {
      width: box.current.clientWidth || 300, height, scales: { x: { time: false }, y: { range } },
      axes: [{ ...axis, label: "token" }, axis], legend: { live: true },
      cursor: { drag: { x: false, y: false }, bind: {
        mouseenter: (_, __, go) => (event) => { isOver = true; return go(event); },
        mouseleave: (_, __, go) => (event) => { isOver = false; return go(event); } } },
      series: [{ label: "token" }, ...series.map((one, k) => ({ label: one.label, width: 2, dash: DASHES[k % DASHES.length],
        stroke: style.getPropertyValue(`--member${k % MAX_COLOURS}-line`).trim(), points: { show: places.length < 40 },
        value: (_, value) => (value == null ? "–" : value.toFixed(3)) }))],
      hooks: { setCursor: [(drawn) => isOver && told.current?.(drawn.cursor.idx ?? null)] },
    };
    plot.current = new window.uPlot(options, [places, ...series.map((one) => one.values)], box.current);
    const resized = new ResizeObserver(([entry]) => plot.current.setSize({ width: entry.contentRect.width, height }));
    resized.observe(box.current);
    return () => {
      resized.disconnect();
      plot.current.destroy();
    };
  }, [shape, useColourScheme()]);
  useEffect(() => plot.current.setData([places, ...series.map((one) => one.values)]), [places.length, series]);
  useEffect(() => {
    const index = places.indexOf(at);
    const left = index < 0 ? -10 : plot.current.valToPos(at, "x");
    plot.current.setCursor({ left, top: index < 0 ? -10 : height / 2 }, false);
  }, [at, places.length]);
  return html`<div class="lines" ref=${box}></div>`;
}

function useColourScheme() {
  const query = matchMedia("(prefers-color-scheme: dark)");
  const [isDark, set] = useState(query.matches);
  useEffect(() => {
    const changed = () => set(query.matches);
    query.addEventListener("change", changed);
    return () => query.removeEventListener("change", changed);
  }, []);
  return isDark;
}

/** The numbers of a chart. Made when it is opened: there may be thousands. */
export function TableTwin({ title, head, rows }) {
  const [isOpen, open] = useState(false);
  return html`<details class="twin" onToggle=${(event) => open(event.target.open)}>
    <summary>${title}</summary>
    ${isOpen && html`<div class="scroll" tabindex="0" role="region" aria-label=${title}><table>
      <thead><tr>${head.map((name) => html`<th scope="col">${name}</th>`)}</tr></thead>
      <tbody>${rows().map((row) => html`<tr>${row.map((cell, k) => (k ? html`<td>${cell}</td>` : html`<th scope="row">${cell}</th>`))}</tr>`)}</tbody>
    </table></div>`}
  </details>`;
}
