// A server that does not answer is told where the answer would stand.
addEventListener("htmx:sendError", function (event) {
  var notice = document.createElement("p");
  notice.className = "notice";
  notice.setAttribute("role", "alert");
  notice.textContent = "The server does not answer. Is rmscope serve still running?";
  event.detail.target.replaceChildren(notice);
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
