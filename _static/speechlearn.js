/* A tick for each chapter, kept in this browser only. */
(function () {
  "use strict";
  var KEY = "speechlearn:done";

  function load() {
    try { return JSON.parse(window.localStorage.getItem(KEY)) || {}; } catch (error) { return {}; }
  }

  function store(done) {
    try { window.localStorage.setItem(KEY, JSON.stringify(done)); } catch (error) { /* private mode: nothing is kept */ }
  }

  function paint(done) {
    var total = 0, finished = 0;
    document.querySelectorAll(".bd-sidebar-primary a[href], nav.bd-links a[href]").forEach(function (link) {
      var path = link.pathname || "";
      var name = Object.keys(done).find(function (chapter) { return path.endsWith("/nbs/" + chapter + ".html"); });
      // the page itself is linked as "#"
      if (!name && link.getAttribute("href") === "#") {
        name = Object.keys(done).find(function (chapter) { return window.location.pathname.endsWith("/nbs/" + chapter + ".html"); });
      }
      link.classList.toggle("done", Boolean(name && done[name]));
    });
    document.querySelectorAll(".chapter-progress").forEach(function (place) {
      total = Number(place.dataset.total) || 0;
      finished = Object.keys(done).filter(function (chapter) { return done[chapter]; }).length;
      place.textContent = total ? finished + " of " + total + " chapters done" : finished + " chapters done";
    });
  }

  document.addEventListener("DOMContentLoaded", function () {
    var done = load();
    document.querySelectorAll("input.chapter-tick").forEach(function (box) {
      box.checked = Boolean(done[box.dataset.chapter]);
      box.addEventListener("change", function () {
        done = load();
        if (box.checked) { done[box.dataset.chapter] = true; } else { delete done[box.dataset.chapter]; }
        store(done);
        paint(done);
      });
    });
    paint(done);
  });
})();
