// What screen readers are told of what happens elsewhere on the page.

/** Says `text` once whoever listens has a pause. */
export function announce(text) {
  const region = document.getElementById("announcements");
  if (!region || !text.trim()) return;
  const line = document.createElement("p");
  line.textContent = text;
  region.append(line);
  while (region.children.length > 20) region.firstChild.remove();
}
