#!/usr/bin/env python3
"""Drives port 111 with the official SDKs, unchanged but for the endpoint.

Needs alibabacloud-eci20180808 (current) and aliyun-python-sdk-eci (older). Each generation creates a group, waits until
it runs, describes it, reads its log, runs commands in it, and deletes it. Ends with 0 when every answer is right.
"""

import argparse
import json
import sys
import time
import urllib.parse

NAME = "sdk-test"
LINE = "hello from the group"


class Failed(Exception):
    pass


def check(what, condition, seen=None):
    if not condition:
        raise Failed(f"{what}: got {seen!r}")
    print(f"ok: {what}", flush=True)


class Current:
    """alibabacloud_eci20180808"""

    def __init__(self, arguments, signature=None):
        from alibabacloud_eci20180808.client import Client
        from alibabacloud_tea_openapi.models import Config

        config = Config(
            endpoint=arguments.endpoint,
            protocol=arguments.protocol,
            region_id=arguments.region,
            access_key_id=arguments.key,
            access_key_secret=arguments.secret,
            read_timeout=arguments.timeout * 1000,
        )
        if signature:
            config.signature_algorithm = signature
        self.client = Client(config)
        self.region = arguments.region

    def regions(self):
        from alibabacloud_eci20180808 import models

        return self.client.describe_regions(models.DescribeRegionsRequest()).body.to_map()["Regions"]

    def create(self, arguments, token):
        from alibabacloud_eci20180808 import models

        container = models.CreateContainerGroupRequestContainer(
            name="main",
            image=arguments.image,
            image_pull_policy="IfNotPresent",
            command=["sh", "-c", f"echo {LINE}; exec sleep 3600"],
            environment_var=[models.CreateContainerGroupRequestContainerEnvironmentVar(key="GREETING", value="a b&c=d")],
            volume_mount=[models.CreateContainerGroupRequestContainerVolumeMount(name="scratch", mount_path="/scratch")],
        )
        request = models.CreateContainerGroupRequest(
            region_id=self.region,
            container_group_name=NAME,
            cpu=arguments.cpu,
            memory=arguments.memory,
            restart_policy="Never",
            client_token=token,
            tag=[models.CreateContainerGroupRequestTag(key="team", value="sdk")],
            volume=[models.CreateContainerGroupRequestVolume(name="scratch", type="EmptyDirVolume")],
            container=[container],
        )
        return self.client.create_container_group(request).body.container_group_id

    def refused(self):
        """The code of a creation without an image."""
        from alibabacloud_eci20180808 import models

        request = models.CreateContainerGroupRequest(
            region_id=self.region,
            container_group_name=NAME,
            container=[models.CreateContainerGroupRequestContainer(name="main")],
        )
        try:
            self.client.create_container_group(request)
        except Exception as error:  # The SDK's own classes differ between versions.
            return error.code
        return None

    def describe(self, group):
        from alibabacloud_eci20180808 import models

        request = models.DescribeContainerGroupsRequest(
            region_id=self.region, container_group_ids=json.dumps([group])
        )
        return self.client.describe_container_groups(request).body.to_map()["ContainerGroups"]

    def log(self, group):
        from alibabacloud_eci20180808 import models

        request = models.DescribeContainerLogRequest(
            region_id=self.region, container_group_id=group, container_name="main", tail=100
        )
        return self.client.describe_container_log(request).body.content

    def exec(self, group, command, sync):
        from alibabacloud_eci20180808 import models

        request = models.ExecContainerCommandRequest(
            region_id=self.region,
            container_group_id=group,
            container_name="main",
            command=json.dumps(command),
            sync=sync,
            tty=False,
        )
        return self.client.exec_container_command(request).body.to_map()

    def update(self, _, group, greeting):
        from alibabacloud_eci20180808 import models

        container = models.UpdateContainerGroupRequestContainer(
            name="main",
            environment_var=[models.UpdateContainerGroupRequestContainerEnvironmentVar(key="GREETING", value=greeting)],
        )
        request = models.UpdateContainerGroupRequest(
            region_id=self.region,
            container_group_id=group,
            update_type="IncrementalUpdate",
            container=[container],
        )
        return self.client.update_container_group(request).body.request_id

    def delete(self, group):
        from alibabacloud_eci20180808 import models

        request = models.DeleteContainerGroupRequest(region_id=self.region, container_group_id=group)
        return self.client.delete_container_group(request).body.request_id


class Older:
    """aliyun-python-sdk-eci"""

    def __init__(self, arguments):
        from aliyunsdkcore.client import AcsClient

        host, _, port = arguments.endpoint.partition(":")
        self.host = host
        self.client = AcsClient(
            arguments.key, arguments.secret, arguments.region, port=int(port or 111), timeout=arguments.timeout
        )

    def call(self, name, **fields):
        module = __import__(f"aliyunsdkeci.request.v20180808.{name}Request", fromlist=["x"])
        request = getattr(module, f"{name}Request")()
        request.set_endpoint(self.host)
        for field, value in fields.items():
            getattr(request, f"set_{field}")(value)
        return json.loads(self.client.do_action_with_exception(request))

    def regions(self):
        return self.call("DescribeRegions")["Regions"]

    def container(self, arguments, greeting):
        return {
            "Name": "main",
            "Image": arguments.image,
            "ImagePullPolicy": "IfNotPresent",
            "Commands": ["sh", "-c", f"echo {LINE}; exec sleep 3600"],
            "EnvironmentVars": [{"Key": "GREETING", "Value": greeting}],
            "VolumeMounts": [{"Name": "scratch", "MountPath": "/scratch"}],
        }

    def create(self, arguments, token):
        return self.call(
            "CreateContainerGroup",
            ContainerGroupName=NAME,
            Cpu=arguments.cpu,
            Memory=arguments.memory,
            RestartPolicy="Never",
            ClientToken=token,
            Tags=[{"Key": "team", "Value": "sdk"}],
            Volumes=[{"Name": "scratch", "Type": "EmptyDirVolume"}],
            Containers=[self.container(arguments, "a b&c=d")],
        )["ContainerGroupId"]

    def refused(self):
        from aliyunsdkcore.acs_exception.exceptions import ServerException

        try:
            self.call("CreateContainerGroup", ContainerGroupName=NAME, Containers=[{"Name": "main"}])
        except ServerException as error:
            return error.get_error_code()
        return None

    def describe(self, group):
        return self.call("DescribeContainerGroups", ContainerGroupIds=json.dumps([group]))["ContainerGroups"]

    def log(self, group):
        return self.call("DescribeContainerLog", ContainerGroupId=group, ContainerName="main", Tail=100)["Content"]

    def exec(self, group, command, sync):
        return self.call(
            "ExecContainerCommand",
            ContainerGroupId=group,
            ContainerName="main",
            Command=json.dumps(command),
            Sync=sync,
            TTY=False,
        )

    def update(self, arguments, group, greeting):
        # It knows no UpdateType: the list of containers is renewed as a whole.
        containers = [self.container(arguments, greeting)]
        return self.call("UpdateContainerGroup", ContainerGroupId=group, Containers=containers)["RequestId"]

    def delete(self, group):
        return self.call("DeleteContainerGroup", ContainerGroupId=group)["RequestId"]


def over_websocket(uri):
    """Everything a command writes, over the WebSocket the API names."""
    import websocket

    socket = websocket.create_connection(uri, timeout=60, subprotocols=["v4.channel.k8s.io"])
    output, status = b"", b""
    while True:
        opcode, data = socket.recv_data()
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            break
        if opcode == websocket.ABNF.OPCODE_BINARY and data:
            if data[0] in (1, 2):
                output += data[1:]
            elif data[0] == 3:
                status += data[1:]
    socket.close()
    return output.decode(), json.loads(status)


def run(name, sdk, arguments):
    print(f"# {name}", flush=True)
    regions = sdk.regions()
    check("a region is named", regions and regions[0].get("RegionId"), regions)
    check("a creation without an image is refused", sdk.refused() == "MissingParameter")
    token = f"{NAME}-{time.time_ns()}"
    group = sdk.create(arguments, token)
    check("a group is created", group.startswith("eci-"), group)
    try:
        check("the same token gives the same group", sdk.create(arguments, token) == group)
        deadline = time.monotonic() + arguments.timeout
        while True:
            (seen,) = sdk.describe(group)
            if seen["Status"] not in ("Scheduling", "Pending"):
                break
            if time.monotonic() > deadline:
                raise Failed(f"the group is still {seen['Status']} after {arguments.timeout} s: {seen.get('Events')}")
            time.sleep(0.5)
        check("it runs", seen["Status"] == "Running", seen)
        check("it has its name", seen["ContainerGroupName"] == NAME, seen)
        check("it has its tag", seen["Tags"] == [{"Key": "team", "Value": "sdk"}], seen["Tags"])
        check("it has an address", seen.get("IntranetIp"), seen)
        container = seen["Containers"][0]
        check("its container runs", container["CurrentState"]["State"] == "Running", container)
        check("its variable is kept", container["EnvironmentVars"][0]["Value"] == "a b&c=d", container)
        # A container that has started has not yet printed; the API has no way to wait for a line.
        log = sdk.log(group)
        while not log and time.monotonic() < deadline:
            time.sleep(0.5)
            log = sdk.log(group)
        check("its log is read", log if arguments.fake else LINE in log, log)
        output = sdk.exec(group, ["echo", "a  b", "c"], True)["SyncResponse"]
        check("a command is run", output == "a  b c\n", output)
        if not arguments.fake:
            output = sdk.exec(group, ["sh", "-c", 'printf %s "$GREETING"'], True)["SyncResponse"]
            check("its variable is set", output == "a b&c=d", output)
        uri = sdk.exec(group, ["echo", "over", "a", "websocket"], False)["WebSocketUri"]
        check("a WebSocket is named", urllib.parse.urlsplit(uri).scheme in ("ws", "wss"), uri)
        output, status = over_websocket(uri)
        check("a command is run on it", output == "over a websocket\n", output)
        check("its end is told", status["status"] == "Success", status)
        check("the group is updated", sdk.update(arguments, group, "good day"))
        while True:
            (seen,) = sdk.describe(group)
            container = seen["Containers"][0]
            states = (seen["Status"], container["CurrentState"]["State"])
            if states == ("Running", "Running") and container["EnvironmentVars"][0]["Value"] == "good day":
                break
            if time.monotonic() > deadline:
                raise Failed(f"the group is {states} after its update: {seen.get('Events')}")
            time.sleep(0.5)
        check("it keeps the rest", container["Commands"][:1] == ["sh"], container)
        if not arguments.fake:
            output = sdk.exec(group, ["sh", "-c", 'printf %s "$GREETING"'], True)["SyncResponse"]
            check("its container has the new variable", output == "good day", output)
    finally:
        check("the group is deleted", sdk.delete(group))
    deadline = time.monotonic() + arguments.timeout
    while sdk.describe(group):
        if time.monotonic() > deadline:
            raise Failed(f"the group is still there {arguments.timeout} s after its deletion")
        time.sleep(0.5)
    check("it is gone", True)
    check("deleting it again is no error", sdk.delete(group))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint", default="127.0.0.1:111")
    parser.add_argument("--protocol", default="http")
    parser.add_argument("--key", required=True, help="AccessKey id")
    parser.add_argument("--secret", required=True, help="AccessKey secret")
    parser.add_argument("--region", default="local")
    parser.add_argument("--image", default="busybox:1", help="an image with sh, echo, printf and sleep")
    parser.add_argument("--cpu", type=float, default=0.5)
    parser.add_argument("--memory", type=float, default=1.0)
    parser.add_argument("--timeout", type=int, default=120, help="seconds for anything to happen")
    parser.add_argument("--sdk", choices=["all", "current", "current-v2", "older"], default="all")
    parser.add_argument("--fake", action="store_true", help="the engine plays echo only (the agent's own tests)")
    arguments = parser.parse_args()
    sdks = {
        "current": lambda: Current(arguments),
        "current-v2": lambda: Current(arguments, signature="v2"),
        "older": lambda: Older(arguments),
    }
    chosen = sdks if arguments.sdk == "all" else {arguments.sdk: sdks[arguments.sdk]}
    try:
        for name, make in chosen.items():
            run(name, make(), arguments)
    except Failed as failure:
        print(f"FAILED: {failure}", flush=True)
        return 1
    print("all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
