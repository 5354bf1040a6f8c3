//! Data of tasks that lie on the Hugging Face hub, or on what looks like it: a server in this process.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

mod common;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use common::{Outcome, Workshop};

const INPUT: i32 = 2;
const MACHINE: i32 = 1;

const TASK: &str = "data = 'letters.jsonl'\n\
                    [multiple_choice]\nprompt = '{{ who }} wrote'\nchoices = '[\"to New York\", \"back\"]'\nanswer = 'gold'\n\
                    [hub]\nrepository = 'someone/letters'\nfile = 'of 1900/test.jsonl'\nrevision = 'refs/pr/1'\n\
                    [hub.record]\nwho = 'name | upper'\ngold = '1 if back else 0'\n";
const THERE: &str = "{\"name\": \"Ada\", \"back\": false}\n{\"name\": \"Isaac\", \"back\": true}\n";
const HERE: &str = "{\"gold\":0,\"who\":\"ADA\"}\n{\"gold\":1,\"who\":\"ISAAC\"}\n";
const PATH: &str = "/datasets/someone/letters/resolve/refs%2Fpr%2F1/of%201900/test.jsonl";

/// Paths that were asked for, each with who asked.
type Asked = Arc<Mutex<Vec<(String, Option<String>)>>>;

/// Answers to paths until the process ends.
struct Server {
    address: String,
    asked: Asked,
}

impl Server {
    fn start<const N: usize>(answers: [(&'static str, String); N]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (asked, answers) = (Asked::default(), HashMap::from(answers));
        let seen = asked.clone();
        std::thread::spawn(move || {
            listener.incoming().for_each(|stream| answer(&stream.unwrap(), &answers, &seen));
        });
        Self { address, asked }
    }

    fn asked(&self) -> Vec<(String, Option<String>)> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

fn answer(mut stream: &TcpStream, answers: &HashMap<&str, String>, asked: &Asked) {
    let lines: Vec<String> =
        BufReader::new(stream).lines().map(Result::unwrap).take_while(|line| !line.is_empty()).collect();
    let path = lines[0].split(' ').nth(1).unwrap();
    let who = lines.iter().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("authorization").then(|| value.to_owned())
    });
    asked.lock().unwrap().push((path.to_owned(), who));
    let missing = response("404 Not Found", "");
    let text = answers.get(path).unwrap_or(&missing);
    stream.write_all(text.as_bytes()).unwrap();
}

fn response(status: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
}

/// Runs a line with `endpoint` as the hub.
fn run(workshop: &Workshop, line: &str, endpoint: &str, cache: &str) -> Outcome {
    let mut command = workshop.command(line.split_whitespace());
    for proxy in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(proxy).env_remove(proxy.to_lowercase());
    }
    command.env("HF_ENDPOINT", endpoint).env("HF_TOKEN", "secret").env("HF_HUB_CACHE", workshop.path(cache));
    Outcome::of(command.output().unwrap())
}

const LINE: &str = "eval tasks run letters.toml --data sets --hub";

#[test]
fn what_is_missing_is_downloaded_once() {
    let workshop = Workshop::trained();
    workshop.write("letters.toml", TASK);
    let elsewhere = Server::start([("/store/7", response("200 OK", THERE))]);
    let to = format!(
        "HTTP/1.1 302 Found\r\nLocation: {}/store/7\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        elsewhere.address
    );
    let hub = Server::start([(PATH, to)]);
    workshop.fails(
        "eval tasks run letters.toml --data sets",
        INPUT,
        &["cannot find", "letters.jsonl", "--hub"],
    );

    let outcome = run(&workshop, LINE, &format!("{}/", hub.address), "none")
        .expect(0, &["wrote sets/letters.jsonl from"]);
    assert!(outcome.stdout.contains("accuracy"), "{}", outcome.stdout);
    assert_eq!(workshop.read("sets/letters.jsonl"), HERE);
    assert_eq!(workshop.list("sets"), ["letters.jsonl"]);
    // The token is for the hub, not for where it sends to.
    assert_eq!(hub.asked(), [(PATH.to_owned(), Some("Bearer secret".to_owned()))]);
    assert_eq!(elsewhere.asked(), [("/store/7".to_owned(), None)]);

    run(&workshop, LINE, &hub.address, "none").expect(0, &[]);
    assert_eq!(hub.asked(), [], "what is there is not asked for");

    workshop.write("plain.toml", TASK.split("[hub]").next().unwrap().replace("letters.jsonl", "plain.jsonl"));
    run(&workshop, &LINE.replace("letters", "plain"), &hub.address, "none")
        .expect(INPUT, &["cannot find", "plain.jsonl", "[hub]"]);
}

#[test]
fn the_cache_of_the_hubs_own_programs_is_used() {
    let workshop = Workshop::trained();
    let cached = workshop.path("cache/datasets--someone--letters");
    std::fs::create_dir_all(cached.join("snapshots/0123abcd/of 1900")).unwrap();
    std::fs::create_dir_all(cached.join("refs/refs/pr")).unwrap();
    std::fs::write(cached.join("refs/refs/pr/1"), "0123abcd").unwrap();
    std::fs::write(cached.join("snapshots/0123abcd/of 1900/test.jsonl"), THERE).unwrap();
    // Without fields of its own a record is what it is there.
    workshop.write(
        "letters.toml",
        TASK.split("[hub.record]")
            .next()
            .unwrap()
            .replace("{{ who }}", "{{ name }}")
            .replace("'gold'", "'back | int'"),
    );
    run(&workshop, LINE, "http://127.0.0.1:1", "cache")
        .expect(0, &["wrote sets/letters.jsonl from", "0123abcd"]);
    assert_eq!(workshop.read("sets/letters.jsonl"), THERE);
}

#[test]
fn what_cannot_be_downloaded_leaves_nothing_behind() {
    let workshop = Workshop::with_corpus();
    workshop.write("letters.toml", TASK);
    let whole = response("200 OK", THERE);
    let broken = THERE.replace("\"back\": true", "\"forth\": true");
    let cases: [(String, i32, &[&str]); 5] = [
        (response("404 Not Found", ""), INPUT, &["404", "[hub]"]),
        (response("401 Unauthorized", ""), INPUT, &["401", "HF_TOKEN"]),
        (response("503 Service Unavailable", ""), MACHINE, &["503", "try again"]),
        (whole[..whole.len() - 5].to_owned(), MACHINE, &["test.jsonl"]),
        (response("200 OK", &broken), INPUT, &["test.jsonl:2: `hub.record.gold`"]),
    ];
    for (answer, status, words) in cases {
        let hub = Server::start([(PATH, answer)]);
        run(&workshop, LINE, &hub.address, "none").expect(status, words);
        assert!(workshop.list("sets").is_empty(), "{words:?}");
    }
    let words = ["Without a network", "hf download --repo-type dataset someone/letters", "HF_ENDPOINT"];
    run(&workshop, LINE, "http://127.0.0.1:1", "none").expect(MACHINE, &words);
    assert!(workshop.list("sets").is_empty());
}
