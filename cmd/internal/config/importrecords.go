package config

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/viasocks/viasocks/socks"
)

// groupSettings are the settings that become words of a group, with the defaults of Traffic Server.
var groupSettings = []struct{ theirs, ours, unit, preset string }{
	{"server_connect_timeout", "connect-timeout", "s", "10"},
	{"socks_timeout", "handshake-timeout", "s", "100"},
	{"per_server_connection_attempts", "server-attempts", "", "1"},
	{"connection_attempts", "attempts", "", "4"},
	{"server_retry_time", "retry-after", "s", "300"},
	{"server_fail_threshold", "fail-threshold", "", "2"},
}

// otherSettings need no line in our configuration.
var otherSettings = []string{
	"socks_needed", "socks_version", "default_servers", "socks_config_file", "server_retry_timeout", "accept_enabled",
	"accept_port", "http_port",
}

// recordsYAML reads the part records: socks: of records.yaml. It understands block mappings of scalars, which is all
// that Traffic Server has there, and skips other parts.
type recordsYAML struct {
	im   *socksImport
	path []yamlKey
}

type yamlKey struct {
	indent int
	name   string
}

func (y *recordsYAML) line(where, text string) error {
	body := strings.TrimLeft(text, " ")
	indent := len(text) - len(body)
	if body == "" || body[0] == '#' || body == "---" || body == "..." {
		return nil
	}
	for len(y.path) > 0 && y.path[len(y.path)-1].indent >= indent {
		y.path = y.path[:len(y.path)-1]
	}
	inside := len(y.path) == 2 && y.path[0].name == "records" && y.path[1].name == "socks"
	name, value, ok := strings.Cut(body, ":")
	if !ok || value != "" && value[0] != ' ' && value[0] != '\t' {
		if inside {
			return errors.New("must be NAME: VALUE")
		}
		return nil
	}
	if value = yamlScalar(value); value == "" {
		if len(y.path) >= 64 {
			return errors.New("the mappings are too deep")
		}
		y.path = append(y.path, yamlKey{indent, strings.Trim(name, `"'`)})
		if !inside {
			return nil
		}
	}
	if !inside {
		return nil
	}
	return y.im.set(where, strings.Trim(name, `"'`), strings.Trim(value, `"'`))
}

// yamlScalar returns a value without its comment.
func yamlScalar(s string) string {
	s = strings.TrimSpace(s)
	if s != "" && (s[0] == '"' || s[0] == '\'') {
		if end := strings.IndexByte(s[1:], s[0]); end >= 0 {
			return s[:end+2]
		}
		return s
	}
	if i := strings.Index(" "+s, " #"); i >= 0 {
		s = strings.TrimSpace(s[:max(0, i-1)])
	}
	return s
}

// words returns the words of each group.
func (im *socksImport) words() (string, error) {
	var b strings.Builder
	for _, g := range groupSettings {
		v, ok := im.settings[g.theirs]
		if !ok {
			v = setting{text: g.preset}
		}
		text := v.text + g.unit
		if _, err := strconv.ParseUint(v.text, 10, 31); err != nil {
			return "", usagef("%s: proxy.config.socks.%s must be a number", v.where, g.theirs)
		}
		if why := groupWords[g.ours](&socks.GroupOptions{}, text); why != "" {
			return "", usagef("%s: proxy.config.socks.%s is %s here, and %s", v.where, g.theirs, g.ours, why)
		}
		fmt.Fprintf(&b, " %s=%s", g.ours, text)
	}
	return b.String(), nil
}

// scheme returns the scheme for the configured version, which is 4 by default.
func (im *socksImport) scheme() (string, error) {
	v, ok := im.settings["socks_version"]
	switch {
	case !ok || v.text == "4":
		return "socks4", nil
	case v.text == "5":
		return "socks5", nil
	}
	return "", usagef("%s: proxy.config.socks.socks_version must be 4 or 5", v.where)
}

// lines returns the lines of our file, in the order in which Traffic Server decides: no_socks, dest_ip,
// default_servers, direct.
func (im *socksImport) lines() (out []string, err error) {
	words, err := im.words()
	if err != nil {
		return nil, err
	}
	scheme, err := im.scheme()
	if err != nil {
		return nil, err
	}
	out = im.remarks(scheme)
	var rules []string
	add := func(name string, servers []string, sel socks.Select) error {
		var urls []string
		for _, s := range servers {
			urls = append(urls, im.serverURL(scheme, s))
		}
		line := fmt.Sprintf("upstream %s=%s select=%s%s", name, strings.Join(urls, ","), sel, words)
		if len(line) > maxLine {
			return errors.New("the group makes a line that is too long")
		}
		if err := addUpstream(&Config{}, value{"upstream", strings.TrimPrefix(line, "upstream "), line}); err != nil {
			return err
		}
		out = append(out, line)
		if im.hasUser && scheme == "socks5" {
			out = append(out, "# write the password of auth into a file with mode 600, and add: password-file "+name+"=FILE")
		}
		return nil
	}
	rules = append(rules, dstRules(im.direct, "direct")...)
	for i, p := range im.parents {
		name := fmt.Sprintf("ats%d", i+1)
		if err := add(name, p.servers, p.sel); err != nil {
			return nil, usagef("%s: %v", p.where, err)
		}
		rules = append(rules, dstRules(p.nets, "via "+name)...)
	}
	if v, ok := im.settings["default_servers"]; ok && v.text != "" {
		servers, err := importServers(v.text)
		if err == nil {
			err = add("ats", servers, socks.Ordered)
		}
		if err != nil {
			return nil, usagef("%s: proxy.config.socks.default_servers: %v", v.where, err)
		}
		rules = append(rules, "rule via ats")
	} else if len(im.parents) > 0 || len(im.direct) > 0 {
		rules = append(rules, "# without default_servers Traffic Server goes direct; leave this line out to refuse the rest",
			"rule direct")
	}
	if len(rules) == 0 {
		return nil, usagef("cannot import: there is no line with dest_ip, no_socks or default_servers")
	}
	return append(out, rules...), nil
}

// remarks returns remarks about settings that have no line of their own.
func (im *socksImport) remarks(scheme string) (out []string) {
	if v, ok := im.settings["socks_needed"]; ok && v.text == "0" {
		out = append(out, "# socks_needed is 0: Traffic Server does not use what follows")
	}
	if _, ok := im.settings["socks_version"]; !ok {
		out = append(out, "# socks_version is not given: 4 is Traffic Server's default, and carries neither IPv6 nor UDP")
	}
	if im.hasUser && scheme == "socks4" {
		out = append(out, "# auth is left out: Traffic Server uses it with socks_version 5 only")
	}
	var left []string
	for name := range im.settings {
		known := slices.Contains(otherSettings, name)
		for _, g := range groupSettings {
			known = known || g.theirs == name
		}
		if !known && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz_") == "" {
			left = append(left, name)
		}
	}
	slices.Sort(left)
	for _, name := range left {
		out = append(out, "# proxy.config.socks."+name+" is not known and left out")
	}
	return out
}

// dstRules returns rules for networks, several networks on each line.
func dstRules(nets []netip.Prefix, verdict string) (out []string) {
	for part := range slices.Chunk(nets, prefixesEachRule) {
		var all []string
		for _, p := range part {
			all = append(all, p.String())
		}
		out = append(out, "rule dst "+strings.Join(all, ",")+" "+verdict)
	}
	return out
}
