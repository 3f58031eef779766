"""Reports the plan, the measurements and the written files: as JSON, as a table, as a summary in words, as one HTML page.

It measures nothing itself. It may import `api` and every room below it; only `cli` imports it. docs/report.md documents the JSON.
"""
