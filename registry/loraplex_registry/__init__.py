"""The registry room: what an adapter version is, and where it is kept. Knows no torch and no server.

reference (how a version is named) · manifest (what it is made of) · base (what it belongs to) · validate, with
adapter_config and fit (whether it is served, and fits) · blobs, in places or a bucket, and catalog, on sqlite or
postgres (where bytes and rows lie) · registry (the verbs) · http and remote (the verbs over a network), with auth,
tokens and limited (who may do what) · signing, signatures and protections (what is trusted) · cli.
"""
