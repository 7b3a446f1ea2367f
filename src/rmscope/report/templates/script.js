(function () {
  function openTarget() {
    var row = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
    for (var at = row; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    if (row) row.scrollIntoView();
  }
  addEventListener("hashchange", openTarget);
  openTarget();
})();
