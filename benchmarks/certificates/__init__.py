"""Evidence for certified reuse: what it costs, what it reports and what is true, by code that shares none with it."""
