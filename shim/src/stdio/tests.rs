use super::*;

#[test]
fn where_streams_lead() {
    for (uri, expected) in [
        ("", Some(Place::Nowhere)),
        ("/run/fifo", Some(Place::Path("/run/fifo"))),
        ("fifo:///run/fifo", Some(Place::Path("/run/fifo"))),
        ("file:///log", Some(Place::File("/log"))),
        ("binary:///b?a=b", Some(Place::Program { uri: "/b?a=b", acknowledged: false })),
        ("binary-v2:///b", Some(Place::Program { uri: "/b", acknowledged: true })),
        ("ttrpc+unix:///s?stream_id=x", None),
        ("pipe://x", None),
    ] {
        assert_eq!(place(uri).ok(), expected, "{uri}");
    }
}

#[tokio::test]
async fn files_are_appended_to() {
    let directory = std::env::temp_dir().join(format!("stdio-file-{}", std::process::id()));
    let path = directory.join("made/log");
    let uri = format!("file://{}", path.display());
    let io = Io { stdout: uri.clone(), stderr: uri, ..Io::default() };
    for round in 1..3 {
        let opened = Opened::open(&io, &[]).await.unwrap();
        for (_, mut sink) in opened.outputs {
            let (_, done) = sink.write(b"line\n and more".to_vec(), 5).await;
            done.unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "line\n".repeat(2 * round));
    }
    std::fs::remove_dir_all(&directory).unwrap();
}

#[tokio::test]
async fn logging_processes() {
    let directory = std::env::temp_dir().join(format!("stdio-logger-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let script = directory.join("logger");
    let text = "#!/bin/sh\necho ready >&5; exec 5>&-\n(cat <&3; cat <&4; echo $CONTAINER_ID $2) > $1\n";
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let out = directory.join("out");
    let environment = [("CONTAINER_ID".to_owned(), "c1".to_owned())];
    for scheme in ["binary", "binary-v2"] {
        let uri = format!("{scheme}://{}?{}=value", script.display(), out.display());
        let io = Io { stdout: uri.clone(), stderr: uri, ..Io::default() };
        let opened = Opened::open(&io, &environment).await.unwrap();
        for (stream, mut sink) in opened.outputs {
            let (_, done) = sink.write(format!("{stream:?}\n").into_bytes(), 7).await;
            done.unwrap();
        }
        opened.logger.unwrap().end().await;
        assert_eq!(std::fs::read_to_string(&out).unwrap(), "Stdout\nStderr\nc1 value\n");
    }
    let io = Io { stdout: "binary-v2:///bin/true".into(), ..Io::default() };
    let error = Opened::open(&io, &[]).await.err().unwrap();
    assert!(error.text.contains("/bin/true"), "{error}");
    let io = Io { stdout: "binary:///none".into(), ..Io::default() };
    assert!(Opened::open(&io, &[]).await.err().unwrap().text.contains("/none"));
    std::fs::remove_dir_all(&directory).unwrap();
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), what).await.unwrap()
}

#[tokio::test]
async fn output_that_is_held_is_taken_in_although_nobody_reads_it() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (mut theirs, ours) = tokio::net::UnixStream::pair().unwrap();
    let (to, mut reader) = pipe::pipe().unwrap();
    let ear = super::ear::Ear::default();
    let (meter, before) = (Meter::of(Some(ear.clone())), vec![b'<'; 100_000]);
    let pump = tokio::spawn(pump_out(ours, Sink::pipe(to, None), meter.clone(), before.clone()));
    let bytes: Vec<u8> = (0..600_000_u32).map(|index| (index % 251) as u8).collect();
    // More than the pipe and the sockets hold.
    let sent = bytes.clone();
    let sending = tokio::spawn(async move {
        theirs.write_all(&sent).await.unwrap();
        theirs
    });
    assert!(timeout(Duration::from_millis(200), meter.arrived(bytes.len() as u64)).await.is_err());
    assert!(!sending.is_finished());
    meter.hold(true);
    soon(meter.arrived(bytes.len() as u64)).await;
    let mut theirs = soon(sending).await.unwrap();
    meter.hold(false);
    theirs.write_all(b"more").await.unwrap();
    drop(theirs);
    let mut read = Vec::new();
    soon(reader.read_to_end(&mut read)).await.unwrap();
    assert!(read == [&before[..], &bytes, b"more"].concat(), "{} bytes came", read.len());
    assert_eq!(ear.told(), None, "that was more than is kept");
    soon(pump).await.unwrap();
}

#[tokio::test]
async fn of_input_that_is_held_nothing_more_is_sent() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (mut theirs, ours) = tokio::net::UnixStream::pair().unwrap();
    let (mut writer, from) = pipe::pipe().unwrap();
    let feed = Feed::default();
    let pump = tokio::spawn(pump_in(from, ours, feed.clone()));
    writer.write_all(b"first").await.unwrap();
    let mut read = [0; 64];
    assert_eq!(soon(theirs.read(&mut read)).await.unwrap(), 5);
    feed.hold(true);
    assert_eq!(soon(feed.stillness()).await, (5, false));
    writer.write_all(b"second").await.unwrap();
    assert!(timeout(Duration::from_millis(100), theirs.read(&mut read)).await.is_err());
    // So fast that it does not notice.
    feed.hold(false);
    feed.hold(true);
    assert_eq!(soon(feed.stillness()).await, (5, false));
    assert!(timeout(Duration::from_millis(100), theirs.read(&mut read)).await.is_err());
    feed.hold(false);
    assert_eq!(soon(theirs.read(&mut read)).await.unwrap(), 6);
    drop(writer);
    assert_eq!(soon(theirs.read(&mut read)).await.unwrap(), 0);
    feed.hold(true);
    assert_eq!(soon(feed.stillness()).await, (11, true));
    soon(pump).await.unwrap();
}

#[tokio::test]
async fn of_input_that_is_held_all_that_was_written_before_is_sent() {
    use tokio::io::AsyncReadExt;
    let (mut theirs, ours) = tokio::net::UnixStream::pair().unwrap();
    let (writer, from) = pipe::pipe().unwrap();
    let feed = Feed::default();
    let pump = tokio::spawn(pump_in(from, ours, feed.clone()));
    // Nobody reads, until the socket and the pipe are full.
    let mut written = 0;
    while timeout(Duration::from_millis(100), writer.writable()).await.is_ok() {
        written += writer.try_write(&[7; 4096]).unwrap_or(0);
    }
    feed.hold(true);
    let (mut got, mut read) = (0, vec![0; 1 << 20]);
    while got < written {
        got += soon(theirs.read(&mut read)).await.unwrap();
    }
    assert_eq!(soon(feed.stillness()).await, (written as u64, false));
    pump.abort();
}
