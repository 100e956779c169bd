/* Keeps the figures on the page of a run up to date while it is under way. */
"use strict";

(function () {
  const EVERY = 2000; // milliseconds between two looks
  const SPAN = 5; // looks that the present rate is measured over
  const LATER = 3; // looks after the end: what was in flight is still counted

  function fill(section, rows) {
    const lines = rows.map((cells) => {
      const line = document.createElement("tr");
      cells.forEach((text, at) => {
        const cell = document.createElement(at ? "td" : "th");
        if (!at) {
          cell.scope = "row";
        }
        cell.textContent = text;
        line.append(cell);
      });
      return line;
    });
    section.querySelector("tbody").replaceChildren(...lines);
    section.hidden = !rows.length;
  }

  function show(page, live) {
    for (const [name, text] of Object.entries(live.texts)) {
      const place = page.querySelector(`[data-kms="${name}"]`);
      if (place.textContent !== text) { // what is read aloud is read once
        place.textContent = text;
      }
    }
    page.querySelector("progress").value = Number(live.share);
    page.querySelector('[data-kms="error"]').hidden = !live.texts.error;
    page.querySelector(".kms-note").hidden = !live.texts.note;
    for (const button of page.querySelectorAll("[data-kms-wish]")) {
      button.hidden = !live.allowed.includes(button.dataset.kmsWish);
    }
    fill(document.getElementById("kms-shards"), live.shards);
    fill(document.getElementById("kms-bad"), live.bad);
  }

  function follow(page) {
    const fresh = document.getElementById("kms-fresh");
    const marks = [page.dataset.mark];
    let later = LATER;

    function say(name) {
      if (fresh.textContent !== fresh.dataset[name]) {
        fresh.textContent = fresh.dataset[name];
      }
    }

    async function look() {
      if (document.hidden) {
        return true;
      }
      let answer;
      try {
        answer = await fetch(`${page.dataset.url}?since=${encodeURIComponent(marks[0])}`, {
          credentials: "same-origin",
          headers: { Accept: "application/json" },
        });
      } catch {
        say("late");
        return true;
      }
      if (answer.status >= 500) {
        say("late");
        return true;
      }
      if (!answer.ok || answer.redirected) { // signed out, or no longer allowed
        say("gone");
        return false;
      }
      const live = await answer.json();
      marks.push(live.mark);
      marks.splice(0, marks.length - SPAN);
      show(page, live);
      later = live.on ? LATER : later - 1;
      say(later ? "live" : "over");
      return later > 0;
    }

    async function again() {
      if (await look()) {
        window.setTimeout(again, EVERY);
      }
    }

    say("live");
    window.setTimeout(again, EVERY);
  }

  document.addEventListener("DOMContentLoaded", () => {
    const page = document.getElementById("kms-run");
    if (page && page.dataset.mark) {
      follow(page);
    }
  });
})();
