// A server that does not answer is told where the answer would stand.
addEventListener("htmx:sendError", function (event) {
  var notice = document.createElement("p");
  notice.className = "notice";
  notice.setAttribute("role", "alert");
  notice.textContent = "The server does not answer. Is rmscope serve still running?";
  event.detail.target.replaceChildren(notice);
});

// What was typed or chosen before the page was ready is searched for as well.
addEventListener("htmx:load", function (event) {
  if (event.detail.elt !== document.body) return;
  document.querySelectorAll("form.filter").forEach(function (form) {
    var changed = Array.from(form.elements).some(function (field) {
      if (field.type === "search") return field.value !== field.defaultValue;
      return field.selectedOptions && !field.selectedOptions[0].defaultSelected && field.selectedIndex > 0;
    });
    if (changed) htmx.trigger(form, "change");
  });
});

// Bench: completions that are empty and not among the first two are hidden until they are asked for.
(function () {
  var add = document.querySelector("[data-add]");
  if (!add) return;
  var spare = Array.from(document.querySelectorAll(".completion.spare"));
  spare.forEach(function (box) { box.hidden = true; });
  function update() { add.hidden = !spare.some(function (box) { return box.hidden; }); }
  add.addEventListener("click", function () {
    var next = spare.find(function (box) { return box.hidden; });
    next.hidden = false;
    next.querySelector("textarea").focus();
    update();
  });
  update();
})();

// A strength is told beside its slider.
addEventListener("input", function (event) {
  var field = event.target;
  if (field.type !== "range") return;
  var told = { "0": "0, ablated", "1": "1, as it is" }[field.value] || field.value;
  field.parentNode.querySelector("output").textContent = told;
});

// Arrow keys turn to the page before or after; Ctrl+K goes to the search.
addEventListener("keydown", function (event) {
  var field = event.target.closest("input, textarea, select, [contenteditable], .tall, .table-wrap");
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
    var search = document.querySelector("#text");
    if (search) { event.preventDefault(); search.focus(); }
    return;
  }
  if (field || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  var rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  var links = rel ? document.querySelectorAll('nav.turn a[rel="' + rel + '"]') : [];
  if (links.length) links[links.length - 1].click();
});
