"use strict";
// Sorting of all tables with class "sortable", and the filter of the tensors.
{
  const collator = new Intl.Collator("en", { numeric: true });

  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? collator.compare(a, b) : x - y;
  };

  // Clicks on a heading sort up, down, and back to the original order. Missing values always come last.
  const sortBy = (table, heading, column) => {
    const turn = { none: "ascending", ascending: "descending", descending: "none" };
    const order = turn[heading.ariaSort];
    for (const other of table.querySelectorAll("th[aria-sort]")) other.ariaSort = "none";
    heading.ariaSort = order;
    const value = (row) => row.cells[column].dataset.value;
    const sign = order === "descending" ? -1 : 1;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      if (order === "none") return a.dataset.place - b.dataset.place;
      const [x, y] = [value(a), value(b)];
      if (!x || !y) return (x ? 0 : 1) - (y ? 0 : 1) || a.dataset.place - b.dataset.place;
      return sign * compare(x, y) || a.dataset.place - b.dataset.place;
    });
    table.tBodies[0].append(...rows);
  };

  // Find the body column of each heading; some headings span two rows or several columns.
  const numberColumns = (table) => {
    const taken = new Set();
    [...table.tHead.rows].forEach((row, r) => {
      for (const cell of row.cells) {
        let column = 0;
        while (taken.has(`${r} ${column}`)) column += 1;
        cell.dataset.column = column;
        for (let down = r; down < r + cell.rowSpan; down += 1)
          for (let k = column; k < column + cell.colSpan; k += 1) taken.add(`${down} ${k}`);
      }
    });
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    numberColumns(table);
    [...table.tBodies[0].rows].forEach((row, place) => (row.dataset.place = place));
    for (const heading of table.querySelectorAll("th[aria-sort]")) {
      heading.querySelector("button").addEventListener("click", () => sortBy(table, heading, heading.dataset.column));
    }
  }

  const name = document.getElementById("filter-name");
  const warned = document.getElementById("filter-warned");
  const filter = () => {
    const rows = [...document.getElementById("tensor-table").tBodies[0].rows];
    const wanted = name.value.trim().toLowerCase();
    for (const row of rows) {
      row.hidden = !row.dataset.name.toLowerCase().includes(wanted) || (warned.checked && !row.matches(".warned"));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    const count = shown === rows.length ? shown : `${shown} of ${rows.length}`;
    document.getElementById("filter-count").value = `${count} tensors`;
  };
  name.addEventListener("input", filter);
  warned.addEventListener("input", filter);
  name.form.addEventListener("submit", (event) => event.preventDefault());
}
