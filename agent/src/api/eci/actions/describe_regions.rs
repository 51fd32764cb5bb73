//! DescribeRegions

use serde_json::json;

use super::{ActionResult, Call, fields};

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    let config = &call.door.config;
    // A client that calls the region by another name learns ours all the same.
    Ok(fields(json!({
        "Regions": [{
            "RegionId": config.region_id,
            "RegionEndpoint": call.host,
            "Zones": [config.zone_id],
            "RecommendZones": [config.zone_id],
        }],
    })))
}
