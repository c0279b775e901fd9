// Sort, filter and open the rows of a table. Without this script every table and every link still works.
"use strict";

// The number at the begin of a cell, with a true minus sign and thousands; NaN for text.
function numberOf(text) {
  const found = /^[+-]?[\d,]*\.?\d+(e[+-]?\d+)?/i.exec(text.replace(/−/g, "-"));
  return found ? Number(found[0].replace(/,/g, "")) : NaN;
}

function compare(first, second) {
  const [a, b] = [numberOf(first), numberOf(second)];
  if (!Number.isNaN(a) && !Number.isNaN(b)) return a - b;
  if (Number.isNaN(a) !== Number.isNaN(b)) return Number.isNaN(a) ? 1 : -1;
  return first.localeCompare(second);
}

function rowsOf(table) {
  return [...table.tBodies[0].rows].filter((row) => !row.classList.contains("opened"));
}

function close(table) {
  for (const row of table.querySelectorAll(".opened")) row.remove();
}

function sort(table, head) {
  close(table);
  const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const absent = (text) => text === "–" || text === "";
  const sign = order === "ascending" ? 1 : -1;
  const keyed = rowsOf(table).map((row) => [row.cells[head.cellIndex].textContent.trim(), row]);
  keyed.sort(([a], [b]) => absent(a) - absent(b) || sign * compare(a, b));
  table.tBodies[0].append(...keyed.map(([, row]) => row));
}

function filter(table, text, count) {
  close(table);
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rowsOf(table)) {
    const said = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => said.includes(word));
    shown += !row.hidden;
  }
  count.textContent = `${shown} of ${rowsOf(table).length} rows.`;
}

// Show the runs of a row below it, or hide them again.
function toggle(table, row) {
  const next = row.nextElementSibling;
  const wasOpen = next !== null && next.classList.contains("opened");
  close(table);
  if (wasOpen) return;
  const opened = document.createElement("tr");
  opened.className = "opened";
  const cell = opened.insertCell();
  cell.colSpan = row.cells.length;
  const links = [...row.querySelectorAll(".runs a")];
  cell.append(links.length ? `${links.length} run${links.length > 1 ? "s" : ""}: ` : "As published; no run of ours.");
  for (const link of links) {
    const copy = link.cloneNode();
    copy.textContent = link.title;
    cell.append(copy, " ");
  }
  row.after(opened);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const place = table.parentElement;
  const count = place.previousElementSibling;
  const input = count.previousElementSibling.querySelector("input");
  input.addEventListener("input", () => filter(table, input.value, count));
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (head && head.querySelector("button")) sort(table, head);
  });
  table.tBodies[0].addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (!event.target.closest("a") && !row.classList.contains("opened")) toggle(table, row);
  });
}
