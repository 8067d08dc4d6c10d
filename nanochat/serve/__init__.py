"""Models over HTTP: the protocol of the OpenAI API, and a page to chat on."""
