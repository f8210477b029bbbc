package config

import (
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/socks"
)

func TestGroup(t *testing.T) {
	c, err := Parse(Check, []string{"--upstream", "g=socks5://a:p,w@10.0.0.1,socks5://10.0.0.2:1081 select=latched attempts=3 " +
		"server-attempts=2 fail-threshold=5 fail-window=10s retry-after=7s connect-timeout=2s handshake-timeout=9s check=4s"},
		nil)
	if err != nil {
		t.Fatal(err)
	}
	u := c.Upstreams[0]
	want := socks.GroupOptions{
		Select:           socks.Latched,
		Attempts:         3,
		ServerAttempts:   2,
		FailThreshold:    5,
		FailWindow:       10 * time.Second,
		RetryAfter:       7 * time.Second,
		ConnectTimeout:   2 * time.Second,
		HandshakeTimeout: 9 * time.Second,
		Check:            4 * time.Second,
	}
	if u.Group != want {
		t.Errorf("%+v", u.Group)
	}
	if s := u.Servers(); len(s) != 2 || s[0].String() != "socks5://10.0.0.1:1080" || s[1].String() != "socks5://10.0.0.2:1081" ||
		!s[0].HasCredentials() {
		t.Errorf("%v", s)
	}
	for _, tt := range []struct{ words, want string }{
		{"select=random", "must be ordered, round-robin, hash or latched"},
		{"attempts=0", "attempts must be a number from 1 to 100"},
		{"server-attempts=-1", "must be a number"},
		{"fail-threshold=0", "must be a number"},
		{"retry-after=0s", "must be a time from 1s to 24h"},
		{"fail-window=-5s", "must be a time"},
		{"connect-timeout=0", "must be a time"},
		{"check=0s", "must be a time"},
		{"colour=red", "there is no word"},
		{"select=hash select=hash", "given twice"},
	} {
		_, err := Parse(Check, []string{"--upstream", "g=socks5://10.0.0.1,socks5://10.0.0.2 " + tt.words}, nil)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.words, err)
		}
	}
	if _, err := Parse(Check, []string{"--upstream", "g=socks5://10.0.0.1,socks5://10.0.0.1"}, nil); err == nil {
		t.Error("one server twice is taken")
	}
	if _, err := Parse(Check, []string{"--upstream", "g=" + strings.Repeat("socks5://h,", 3) + "socks5://x:secret@h,socks5://"},
		nil); err == nil ||
		strings.Contains(err.Error(), "secret") {
		t.Errorf("%v", err)
	}
}

// An upstream is reached through another one, which may stand behind it or be --proxy; what never reaches a server is refused.
func TestChains(t *testing.T) {
	chain := func(ups ...string) (*Config, error) {
		args := []string{"--proxy", "socks5://10.0.0.1"}
		for _, u := range ups {
			args = append(args, "--upstream", u)
		}
		return Parse(Check, args, nil)
	}
	c, err := chain("far=socks5://far.example via=mid select=latched", "mid=socks5://mid.example via=proxy")
	if err != nil {
		t.Fatal(err)
	}
	if c.Upstreams[1].Via != "mid" || c.Upstreams[2].Via != "proxy" || c.Upstreams[1].Group.Select != socks.Latched {
		t.Errorf("%+v", c.Upstreams)
	}
	if c.Upstreams[0].Reached() == nil || c.Upstreams[1].Reached() != nil {
		t.Error("only the first server of a chain is connected to")
	}
	for _, tt := range []struct {
		ups  []string
		want string
	}{
		{[]string{"a=socks5://h via=a"}, "names the upstream itself"},
		{[]string{"a=socks5://h via=direct"}, "leave it out"},
		{[]string{"a=socks5://h via=via"}, "must be the name of another upstream"},
		{[]string{"a=socks5://h via="}, "must be the name of another upstream"},
		{[]string{"a=socks5://h via=b via=b"}, "given twice"},
		{[]string{"a=socks5://h via=b"}, "which does not exist"},
		{[]string{"a=socks5://h via=b", "b=socks5://i via=c", "c=socks5://j via=a"}, "comes back to a"},
		{[]string{"x=socks5://h via=a", "a=socks5://h via=b", "b=socks5://i via=a"}, "comes back to a"},
		{[]string{"a=socks5+unix:///run/s via=proxy"}, "the socket /run/s cannot be reached via proxy"},
	} {
		if _, err := chain(tt.ups...); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v, want %q", tt.ups, err, tt.want)
		}
	}
}
