"""Pushes the OCI layout in directory LAYOUT to http://REGISTRY as REPOSITORY:TAG, as an index for two platforms.

usage: pull_push.py LAYOUT REGISTRY REPOSITORY TAG [USER:PASSWORD]
"""
import base64
import hashlib
import json
import os
import sys
import urllib.request

layout, registry, repository, tag = sys.argv[1:5]
headers = {}
if len(sys.argv) > 5:
    headers["Authorization"] = "Basic " + base64.b64encode(sys.argv[5].encode()).decode()


def ask(method, url, data=None, kind=None):
    more = dict(headers, **({"Content-Type": kind} if kind else {}))
    return urllib.request.urlopen(urllib.request.Request(url, data, more, method=method), timeout=30)


def manifest(data, kind, name):
    ask("PUT", f"http://{registry}/v2/{repository}/manifests/{name}", data, kind)


blobs = os.path.join(layout, "blobs/sha256")
with open(os.path.join(layout, "index.json")) as file:
    image = json.load(file)["manifests"][0]
for name in os.listdir(blobs):
    with open(os.path.join(blobs, name), "rb") as file:
        data = file.read()
    place = ask("POST", f"http://{registry}/v2/{repository}/blobs/uploads/", b"").headers["Location"]
    joint = "&" if "?" in place else "?"
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    ask("PUT", f"{place}{joint}digest={digest}", data, "application/octet-stream")
KIND = "application/vnd.oci.image.manifest.v1+json"
with open(os.path.join(blobs, image["digest"].split(":")[1]), "rb") as file:
    manifest(file.read(), KIND, image["digest"])
both = [
    {"mediaType": KIND, "digest": image["digest"], "size": image["size"], "platform": {"os": "linux", "architecture": a}}
    for a in ("s390x", "amd64")
]
index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": both}
manifest(json.dumps(index).encode(), index["mediaType"], tag)
