//! Probes by HTTPS.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tests::{pod::Pod, stage::Stage};

const IMAGE: &str = "demo/web:latest";
/// Serves a directory by TLS, to whom sends the right field.
const CONFIG: &str = "
    daemon off; worker_processes 1; pid /tmp/pid; error_log /dev/stderr warn;
    events { worker_connections 16; }
    http { access_log off; server {
        listen 8443 ssl; ssl_certificate /tmp/certificate; ssl_certificate_key /tmp/key;
        if ($http_x_probe != wanted) { return 403; }
        location = /moved { return 302 https://$server_addr:8443/ready; }
        location / { root /tmp/www; }
    } }";
const SCRIPT: &str = "mkdir -p /tmp/www; cd /tmp; echo \"$CERTIFICATE\" >certificate; echo \"$KEY\" >key; \
                      echo \"$CONFIG\" >nginx.conf; exec nginx -c /tmp/nginx.conf";

fn ready(group: &Value) -> bool {
    group["status"]["containers"][0]["ready"] == true
}

pub(crate) fn a_server_with_a_certificate_of_its_own_is_probed(stage: &mut Stage) -> Result<()> {
    stage.registry.push(&stage.product.images.join("web"), IMAGE)?;
    let image = stage.registry.image(IMAGE);
    let host = &stage.host;
    let certified = rcgen::generate_simple_self_signed(vec!["elsewhere".to_owned()])?;
    let variable = |name: &str, value: &str| json!({ "name": name, "value": value.replace('$', "$$") });
    let fields = json!({
        "env": [
            variable("CERTIFICATE", &certified.cert.pem()),
            variable("KEY", &certified.signing_key.serialize_pem()),
            variable("CONFIG", CONFIG),
        ],
        "readinessProbe": {
            "httpGet": {
                "scheme": "HTTPS", "port": 8443, "path": "/moved",
                "httpHeaders": [{ "name": "X-Probe", "value": "wanted" }],
            },
            "periodSeconds": 1, "timeoutSeconds": 20,
        },
    });
    let pod = Pod::new("secure").container_with("web", &image, SCRIPT, fields);
    host.create(&pod)?;
    host.wait_group("secure", "a probe that fails", |group| {
        let events = group["status"]["events"].to_string();
        events.contains("Readiness probe failed: HTTP probe failed with statuscode: 404")
    })?;
    ensure!(!ready(&host.group("secure")?), "ready without the file");
    host.exec("secure", "web", &["/bin/sh", "-c", "echo yes >/tmp/www/ready"])?
        .success()?;
    host.wait_group("secure", "that it is ready", ready)?;
    let shown = host.ecictl(&["describe", "secure"])?.success()?;
    ensure!(shown.contains("http-get https://:8443/moved"), "{shown}");
    host.remove("secure")?;
    host.ecictl(&["image", "rm", &image])?.success().map(drop)
}
