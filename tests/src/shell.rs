//! A distribution's guest, worked in over its serial line.

use std::time::Duration;

use crate::Machine;

/// A boot, or a command, takes a fraction of this on an idle host.
const PATIENCE: Duration = Duration::from_secs(300);

/// A login shell on the serial line.
pub struct Shell {
    /// The machine.
    pub machine: Machine,
    commands: u32,
}

impl Shell {
    /// Logs in as root, without a password.
    ///
    /// # Panics
    /// When it does not come to that.
    #[must_use]
    pub fn login(mut machine: Machine) -> Self {
        machine.expect("login:", PATIENCE);
        machine.send("root\n");
        machine.expect("root@debian", PATIENCE);
        let mut shell = Self { machine, commands: 0 };
        // Escape sequences of the prompt are none of our business.
        shell.must("bind 'set enable-bracketed-paste off'; stty cols 4000; export PAGER=cat");
        shell
    }

    /// Runs what has to succeed; its output.
    ///
    /// # Panics
    /// When it fails, or takes too long.
    pub fn must(&mut self, command: &str) -> String {
        self.commands += 1;
        let (before, number) = (self.machine.text().len(), self.commands);
        // The marks are not in what is echoed.
        self.machine
            .send(&format!("echo BE''GIN{number}; {{ {command}\n}}; echo EN''D{number}:$?:DO''NE{number}\n"));
        let (begin, end) = (format!("BEGIN{number}"), format!("END{number}:"));
        self.machine.expect(&format!("DONE{number}"), PATIENCE);
        let all = self.machine.text();
        let new = all.get(before..).unwrap_or(&all);
        let (output, status) = new
            .split_once(&begin)
            .and_then(|(_, rest)| rest.split_once(&end))
            .unwrap_or_else(|| panic!("{command}: the marks are missing in:\n{new}"));
        assert!(status.starts_with("0:"), "{command} ended with {status}:\n{output}");
        output.trim().to_owned()
    }
}
