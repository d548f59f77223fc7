"""The operator API, /repave/v1: one module a resource; `desk`, `scope` and `answers` are what they share, `routes` puts them together."""
