//! The environment of a logging process, by which it knows whose output it reads.

use crate::planner::Request;

pub(crate) fn environment(request: &Request<'_>) -> Vec<(String, String)> {
    [("CONTAINER_ID", request.id), ("CONTAINER_NAMESPACE", request.namespace)]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
}

#[cfg(test)]
mod tests {
    use crate::testing::Case;

    #[test]
    fn loggers_know_whose_output_they_read() {
        let expected = [("CONTAINER_ID", "c1"), ("CONTAINER_NAMESPACE", "default")];
        assert_eq!(Case::new().plan().logger, expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
    }
}
