"""The planner as a service: observations in, action chunks out, over ZeroMQ and msgpack. Data only, never code.

`wire` is what crosses the network and every check of it, `server` answers, `client` asks without ever blocking the
actor, `keys` makes and reads CurveZMQ keys. Needs the extra ``[serve]``; the core does without. See docs/serving.md.
"""
