// Before the first paint, and so outside the module: the chosen appearance.
try {
  document.documentElement.dataset.theme = JSON.parse(localStorage.getItem("lmd.settings"))?.theme ?? "";
} catch {
  // as the system
}
