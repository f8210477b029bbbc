package route

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// explainCases are the cases of TestExplain.
var explainCases = []struct{ flow, want string }{
	{"tcp:1.2.3.4:25", `0: "port 25" holds`},
	{"tcp:x.bad.example:80", `1: "list=FILE" holds`},
	{"tcp:198.51.100.7:80", `1: "list=FILE" holds`},
	{"tcp:10.1.1.1:443", `2: "dst 10.0.0.0/8" and "port 443" hold`},
	{"tcp:[2001:db8::1]:443 user=1000 exe=/usr/bin/curl", `3: "user 1000" and "exe */curl" hold`},
	{"tcp:[2001:db8::1]:443 user=1001 exe=/usr/bin/curl", `4: "not name .example.com" holds`},
	{"tcp:WWW.example.com.:80 user=0 addr=10.0.0.1", `5: it has no condition`},
	{"tcp:www.example.com:80 user=1000 exe=/bin/x", `5: it has no condition`},
	{"udp:1.1.1.1:53", "early: port 53 is answered by viasocks itself"},
	{"tcp:127.0.0.1:80", "early: nothing can be carried to this address: it is refused"},
}

func TestExplain(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(file, []byte("198.51.100.0/24\nbad.example\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var rules []Rule
	for _, s := range []string{
		"port 25 reject", "list=" + file + " reject", "dst 10.0.0.0/8 port 443 direct", "user 1000 exe */curl via a",
		"not name .example.com drop", "via b",
	} {
		rules = append(rules, mustRule(t, s))
	}
	for _, tt := range explainCases {
		x, err := ParseQuestion(tt.flow)
		if err != nil {
			t.Errorf("%s: %v", tt.flow, err)
			continue
		}
		steps, i, early := Explain(rules, x)
		got := "early: " + early
		if early == "" {
			got = strings.ReplaceAll(fmt.Sprintf("%d: %s", i, steps[i].Why), file, "FILE")
		}
		if got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.flow, got, tt.want)
		}
		// It is what a Router would do.
		if early == "" {
			for j := range rules {
				if got := rules[j].matches(&x.q) == yes; got != (i == j) {
					t.Errorf("%s: rule %d matches: %v", tt.flow, j, got)
				} else if got {
					break
				}
			}
		}
	}
	// What is missing is asked for.
	x, err := ParseQuestion("tcp:www.example.com:443")
	if err != nil {
		t.Fatal(err)
	}
	steps, i, _ := Explain(rules[:4], x)
	if i != -1 {
		t.Errorf("rule %d", i)
	}
	var why []string
	for _, s := range steps {
		why = append(why, strings.ReplaceAll(s.Why, file, "FILE"))
	}
	want := `"port 25" does not hold|"list=FILE" cannot be decided: add addr=ADDRESS|"dst 10.0.0.0/8" cannot be decided: add addr=ADDRESS|` +
		`"user 1000" cannot be decided: add user=USER; "exe */curl" cannot be decided: add exe=PATH`
	if got := strings.Join(why, "|"); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

func TestParseQuestionErrors(t *testing.T) {
	for s, want := range map[string]string{
		"": "write a flow such as", "tcp": "write it as", "tcp:443": "write it as", "icmp:a:1": `protocol "icmp"`,
		"tcp:a:0": "write it as",
		"tcp:a:b": "write it as", "tcp:2001:db8::1:80": "write it as", "tcp:[1.2.3.4]:80": "write it as",
		"tcp:1.2.3:80": "write it as",
		"tcp:a!b:80":   "write it as", "tcp::80": "write it as", "tcp:a:80 x=1": `unknown word "x"`,
		"tcp:a:80 addr=b":   `"b" is not an address`,
		"tcp:a:80 user=1-2": "write one user", "tcp:a:80 user": "write addr=ADDRESS", "tcp:a:80 cgroup=/": "control group",
	} {
		if _, err := ParseQuestion(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", s, err, want)
		}
	}
}
