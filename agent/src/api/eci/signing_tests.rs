use proptest::prelude::*;

use super::*;

const NONCE: &str = "3ee8c1b8-83d3-44af-a94f-4e0ad82fd6cf";
const EMPTY_SHA256: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn now() -> SystemTime {
    "2026-01-01T00:10:00Z".parse::<jiff::Timestamp>().unwrap().into()
}

fn secret_of(id: &str) -> Option<&'static str> {
    (id == "testid").then_some("testsecret")
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

fn rpc_parameters(signature: &str) -> Vec<(String, String)> {
    pairs(&[
        ("AccessKeyId", "testid"),
        ("Action", "DescribeRegions"),
        ("Format", "JSON"),
        ("RegionId", "cn-local"),
        ("SignatureMethod", "HMAC-SHA1"),
        ("SignatureNonce", NONCE),
        ("SignatureVersion", "1.0"),
        ("Timestamp", "2026-01-01T00:00:00Z"),
        ("Version", "2018-08-08"),
        ("Signature", signature),
    ])
}

fn rpc<'a>(method: &'a str, query: &'a [(String, String)], form: &'a [(String, String)]) -> Signed<'a> {
    Signed {
        method,
        path: "/",
        query,
        form,
        headers: &[],
        body: b"",
    }
}

fn acs3_headers(signature: &str) -> Vec<(String, String)> {
    let authorization = format!(
        "ACS3-HMAC-SHA256 Credential=testid,SignedHeaders=host;x-acs-action;x-acs-content-sha256;x-acs-date;\
         x-acs-signature-nonce;x-acs-version,Signature={signature}"
    );
    pairs(&[
        ("host", "127.0.0.1:111"),
        ("x-acs-action", "DescribeRegions"),
        ("x-acs-content-sha256", EMPTY_SHA256),
        ("x-acs-date", "2026-01-01T00:00:00Z"),
        ("x-acs-signature-nonce", NONCE),
        ("x-acs-version", "2018-08-08"),
        ("authorization", &authorization),
    ])
}

const ACS3_SIGNATURE: &str = "d7ec20d20186fd9d92adc155cdecd8b5797cfab4980707ec38396d0b0d328f5d";

fn acs3<'a>(headers: &'a [(String, String)], query: &'a [(String, String)]) -> Signed<'a> {
    Signed {
        method: "POST",
        path: "/",
        query,
        form: &[],
        headers,
        body: b"",
    }
}

#[test]
fn rpc_vectors() {
    for (method, signature) in [
        ("GET", "TlJNcNtvYf3K/d9Ijlcr+0aHorg="),
        ("POST", "Ouq0eu94Plv/eWzI5Xc7uuHU1AY="),
    ] {
        let parameters = rpc_parameters(signature);
        let caller = verify(&rpc(method, &parameters, &[]), secret_of, now()).unwrap();
        assert_eq!(
            (caller.access_key_id.as_str(), caller.nonce.as_str()),
            ("testid", NONCE)
        );
        // Parameters may come in the form as well.
        let (query, form) = parameters.split_at(4);
        assert!(verify(&rpc(method, query, form), secret_of, now()).is_ok());
    }
    let text = rpc_string_to_sign(&rpc("GET", &rpc_parameters(""), &[]));
    assert!(
        text.contains("Timestamp%3D2026-01-01T00%253A00%253A00Z"),
        "{text}"
    );
}

#[test]
fn acs3_vector() {
    let headers = acs3_headers(ACS3_SIGNATURE);
    let query = pairs(&[("RegionId", "cn-local")]);
    let signed = acs3(&headers, &query);
    let canonical = acs3_canonical_request(&signed, &REQUIRED_HEADERS, false);
    assert_eq!(
        hex(digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref()),
        "42717488a294e3a823f9102ca563fff115557e43affa14222db28958f7072f01"
    );
    assert_eq!(verify(&signed, secret_of, now()).unwrap().access_key_id, "testid");
}

#[test]
fn wrong_signatures_show_the_string_to_sign() {
    let parameters = rpc_parameters("AAAA");
    let error = verify(&rpc("GET", &parameters, &[]), secret_of, now()).unwrap_err();
    let text = error.to_string();
    let (_, after) = text.split_once(':').unwrap();
    assert_eq!(after, rpc_string_to_sign(&rpc("GET", &parameters, &[])));
    // A changed parameter, a changed header, a changed method.
    let headers = acs3_headers(ACS3_SIGNATURE);
    let query = pairs(&[("RegionId", "cn-other")]);
    assert!(matches!(
        verify(&acs3(&headers, &query), secret_of, now()),
        Err(SigningError::Mismatch { .. })
    ));
    let mut headers = acs3_headers(ACS3_SIGNATURE);
    headers[1].1 = "DeleteContainerGroup".into();
    let query = pairs(&[("RegionId", "cn-local")]);
    assert!(matches!(
        verify(&acs3(&headers, &query), secret_of, now()),
        Err(SigningError::Mismatch { .. })
    ));
}

#[test]
fn bodies_are_covered() {
    let headers = acs3_headers(ACS3_SIGNATURE);
    let query = pairs(&[("RegionId", "cn-local")]);
    let signed = Signed {
        body: b"x",
        ..acs3(&headers, &query)
    };
    assert_eq!(verify(&signed, secret_of, now()), Err(SigningError::BodyHash));
}

#[test]
fn every_part_is_required() {
    for name in [
        "AccessKeyId",
        "Action",
        "SignatureMethod",
        "SignatureNonce",
        "SignatureVersion",
        "Timestamp",
    ] {
        let mut parameters = rpc_parameters("TlJNcNtvYf3K/d9Ijlcr+0aHorg=");
        parameters.retain(|(parameter, _)| parameter != name);
        let result = verify(&rpc("GET", &parameters, &[]), secret_of, now());
        assert_eq!(result, Err(SigningError::Missing { name }));
    }
    let query = pairs(&[("RegionId", "cn-local")]);
    for name in REQUIRED_HEADERS {
        let mut headers = acs3_headers(ACS3_SIGNATURE);
        headers.retain(|(header, _)| header != name);
        let result = verify(&acs3(&headers, &query), secret_of, now());
        assert_eq!(result, Err(SigningError::Missing { name }));
    }
    let mut headers = acs3_headers(ACS3_SIGNATURE);
    headers[6].1 = headers[6].1.replace("x-acs-date;", "");
    assert!(matches!(
        verify(&acs3(&headers, &query), secret_of, now()),
        Err(SigningError::Incomplete(_))
    ));
    assert_eq!(
        verify(&rpc("GET", &[], &[]), secret_of, now()),
        Err(SigningError::NotSigned)
    );
}

#[test]
fn old_and_future_requests_are_refused() {
    let parameters = rpc_parameters("TlJNcNtvYf3K/d9Ijlcr+0aHorg=");
    for (time, fine) in [
        ("2026-01-01T00:15:00Z", true),
        ("2026-01-01T00:15:01Z", false),
        ("2025-12-31T23:45:00Z", true),
        ("2025-12-31T23:44:59Z", false),
    ] {
        let at = time.parse::<jiff::Timestamp>().unwrap().into();
        assert_eq!(
            verify(&rpc("GET", &parameters, &[]), secret_of, at).is_ok(),
            fine,
            "{time}"
        );
    }
    let mut parameters = rpc_parameters("x");
    parameters[7].1 = "yesterday".into();
    assert_eq!(
        verify(&rpc("GET", &parameters, &[]), secret_of, now()),
        Err(SigningError::TimeFormat("yesterday".into()))
    );
}

#[test]
fn unknown_keys_and_schemes_are_named() {
    let mut parameters = rpc_parameters("x");
    parameters[0].1 = "other".into();
    assert_eq!(
        verify(&rpc("GET", &parameters, &[]), secret_of, now()),
        Err(SigningError::UnknownKey)
    );
    let mut headers = acs3_headers(ACS3_SIGNATURE);
    headers[6].1 = headers[6].1.replace("ACS3-HMAC-SHA256", "ACS3-HMAC-SM3");
    assert_eq!(
        verify(&acs3(&headers, &[]), secret_of, now()),
        Err(SigningError::Scheme("ACS3-HMAC-SM3".into()))
    );
}

#[test]
fn encoding_is_that_of_rfc_3986() {
    assert_eq!(encode("a b*~-_.é/"), "a%20b%2A~-_.%C3%A9%2F");
}

proptest! {
    #[test]
    fn any_authorization_is_answered(value in "ACS3-[ -~]{0,120}") {
        let headers = pairs(&[("authorization", &value)]);
        prop_assert!(verify(&acs3(&headers, &[]), secret_of, now()).is_err());
    }
}
