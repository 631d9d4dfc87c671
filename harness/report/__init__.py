"""Pages for reviewers: one bundle (report.html, findings.md) and a site over many."""
