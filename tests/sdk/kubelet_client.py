#!/usr/bin/env python3
"""Drives port 10250 with the stream client of the Kubernetes Python client (package kubernetes).

Reads pods, logs, metrics and statistics, and runs commands. Ends with 0 when every answer is right.
"""

import argparse
import json
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request

from kubernetes import client
from kubernetes.stream import ws_client


class Failed(Exception):
    pass


def check(what, condition, seen=None):
    if not condition:
        raise Failed(f"{what}: got {seen!r}")
    print(f"ok: {what}", flush=True)


class Kubelet:
    def __init__(self, arguments):
        self.arguments = arguments
        self.context = ssl._create_unverified_context()

    def get(self, path, token=None):
        request = urllib.request.Request(self.arguments.server + path)
        token = self.arguments.token if token is None else token
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, context=self.context, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def exec(self, command, stdin=None):
        """stdout, stderr and the exit code of a command."""
        a = self.arguments
        query = [("command", word) for word in command] + [("output", "1"), ("error", "1")]
        if stdin is not None:
            query.append(("input", "1"))
        url = f"{a.server}/exec/{a.namespace}/{a.pod}/{a.container}?{urllib.parse.urlencode(query)}"
        configuration = client.Configuration()
        configuration.verify_ssl = False
        headers = {"authorization": f"Bearer {a.token}", "sec-websocket-protocol": "v4.channel.k8s.io"}
        url = url.replace("https://", "wss://", 1)
        stream = ws_client.WSClient(configuration, url, headers, capture_all=True)
        if stdin is not None:
            stream.write_stdin(stdin)
        stream.run_forever(timeout=a.timeout)
        return stream.read_stdout(timeout=0), stream.read_stderr(timeout=0), stream.returncode


def run(arguments):
    kubelet = Kubelet(arguments)
    check("a request without a token is refused", kubelet.get("/pods", token="")[0] == 401)
    check("the kubelet is healthy", kubelet.get("/healthz") == (200, "ok"))
    status, body = kubelet.get("/pods")
    pods = json.loads(body)
    names = [pod["metadata"]["name"] for pod in pods["items"]]
    check("the pod is listed", arguments.pod in names, names)
    # The part of the client that every typed call goes through; its public name differs between versions.
    parsed = client.ApiClient()._ApiClient__deserialize(pods, "V1PodList")
    check("the list is one of v1", parsed.items[0].status.phase is not None, parsed)
    path = f"/containerLogs/{arguments.namespace}/{arguments.pod}/{arguments.container}"
    status, log = kubelet.get(f"{path}?tailLines=10")
    check("the log is read", status == 200, (status, log))
    status, metrics = kubelet.get("/metrics/resource")
    check("metrics are served", "container_cpu_usage_seconds_total{" in metrics, metrics)
    status, summary = kubelet.get("/stats/summary")
    check("the summary is served", json.loads(summary)["pods"], summary)

    output, _, code = kubelet.exec(["echo", "a b"])
    check("a command is run", (output, code) == ("a b\n", 0), (output, code))
    if arguments.fake:
        _, errors, code = kubelet.exec(["exit", "42"])
        check("its code and errors are told", (errors, code) == ("bye\n", 42), (errors, code))
        output, _, code = kubelet.exec(["lines", "100000"])
    else:
        _, errors, code = kubelet.exec(["sh", "-c", "echo bye >&2; exit 42"])
        check("its code and errors are told", (errors, code) == ("bye\n", 42), (errors, code))
        output, _, code = kubelet.exec(["sh", "-c", 'i=0; while [ $i -lt 100000 ]; do echo "line $i"; i=$((i+1)); done'])
    expected = "".join(f"line {line}\n" for line in range(100000))
    check("100,000 lines come in order", output == expected, len(output))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="https://127.0.0.1:10250")
    parser.add_argument("--token", required=True)
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--pod", required=True)
    parser.add_argument("--container", required=True)
    parser.add_argument("--timeout", type=int, default=120)
    parser.add_argument("--fake", action="store_true", help="the engine plays simple commands (the agent's own tests)")
    try:
        run(parser.parse_args())
    except Failed as failure:
        print(f"FAILED: {failure}", flush=True)
        return 1
    print("all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
