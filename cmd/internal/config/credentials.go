package config

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/socks"
)

// maxPassword is the limit of RFC 1929.
const maxPassword = 255

// maxCA limits --proxy-ca. The certificates of all public authorities take a quarter of it.
const maxCA = 1 << 20

// Where to look for a password that neither the URL nor --password-file gives. Both names may be followed by that of
// an upstream.
const (
	passwordVar        = "VIASOCKS_PASSWORD"
	credentialsVar     = "CREDENTIALS_DIRECTORY" // of systemd.exec(5), LoadCredential
	passwordCredential = "viasocks.password"
)

// addPasswordFile accepts FILE, for --proxy, or NAME=FILE.
func addPasswordFile(c *Config, v value) error {
	name, file, ok := strings.Cut(v.text, "=")
	if !ok || route.CheckName(name) != nil {
		name, file = DefaultUpstream, v.text
	}
	if _, twice := c.passwordFiles[name]; twice {
		return v.err("the upstream %s has a password file already", name)
	}
	if c.passwordFiles == nil {
		c.passwordFiles = map[string]value{}
	}
	c.passwordFiles[name] = value{v.name, file, v.where}
	return nil
}

// finishServers sets the passwords and certificates of the upstreams.
func (c *Config) finishServers(env []string) error {
	for name, v := range c.passwordFiles {
		known := false
		for _, u := range c.Upstreams {
			known = known || u.Name == name
		}
		switch {
		case !known && name == DefaultUpstream:
			return v.err("there is no --proxy that it could belong to")
		case !known:
			return v.err("there is no upstream %s", name)
		}
	}
	var ca []byte
	if c.proxyCA.name != "" {
		var err error
		if ca, err = c.readCertificates(c.proxyCA.text); err != nil {
			return err
		}
	}
	for i := range c.Upstreams {
		u := &c.Upstreams[i]
		all := u.Servers()
		for j, s := range all {
			s, err := c.withSecrets(u.Name, s, env)
			if err != nil {
				return err
			}
			if ca != nil && s.TLS() {
				if s, err = s.WithCA(ca); err != nil {
					return fmt.Errorf("cannot use the certificates %s: %w", c.proxyCA.text, err)
				}
			}
			all[j] = s
		}
		u.Server, u.More = all[0], slices.Clip(all[1:])
		if len(u.More) == 0 {
			u.More = nil
		}
	}
	return nil
}

// readCertificates reads a file of certificates. The caller checks its content.
func (c *Config) readCertificates(path string) ([]byte, error) {
	pem, info, err := readPath(path, maxCA)
	if err != nil {
		return nil, fmt.Errorf("cannot read the certificates %s: %w", path, err)
	}
	c.warnOfWriters("file of certificates", path, info)
	return pem, nil
}

// withSecrets sets the password of a server of the upstream name: that of the URL, of --password-file, of the
// environment, or of systemd, in this order.
func (c *Config) withSecrets(name string, s socks.Server, env []string) (socks.Server, error) {
	if v, ok := c.passwordFiles[name]; ok {
		switch {
		case s.User() == "":
			return s, v.err("the proxy's URL names no user: write socks5://USER@HOST:PORT")
		case s.HasPassword():
			return s, v.err("the proxy's URL has a password already: give it in one place")
		}
		return c.withPassword(s, v.text, true)
	}
	if s.User() == "" || s.HasPassword() || !s.TakesPassword() {
		return s, nil
	}
	of := func(base, sep string, f func(string) string) string {
		if name == DefaultUpstream {
			return base
		}
		return base + sep + f(name)
	}
	if p := lookup(env, of(passwordVar, "_", varName)); p != "" {
		withPassword, err := s.WithCredentials(s.User(), strings.Clone(p))
		if err != nil {
			return s, fmt.Errorf("cannot use %s: %w", of(passwordVar, "_", varName), err)
		}
		return withPassword, nil
	}
	if file := lookup(env, of(passwordVar, "_", varName)+secretFile); file != "" && name != DefaultUpstream {
		return c.withPassword(s, strings.Clone(file), true) // for --proxy this is the variable of --password-file
	}
	if dir := lookup(env, credentialsVar); dir != "" {
		path := filepath.Join(dir, of(passwordCredential, ".", func(s string) string { return s }))
		if exists(path) {
			return c.withPassword(s, path, false)
		}
	}
	return s, nil
}

// varName converts the name of an upstream or option for use in a variable: capitals, and _ for other characters.
func varName(upstream string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, strings.ToUpper(upstream))
}

// withPassword reads the password from the first line of a file. If it is the user's file, its permissions are
// checked.
func (c *Config) withPassword(s socks.Server, path string, ofUser bool) (socks.Server, error) {
	line, info, err := firstLine("password file", path, maxPassword)
	if err != nil {
		return s, err
	}
	if ofUser {
		c.warnOfReaders("password file", path, info)
		c.warnOfWriters("password file", path, info)
	}
	withPassword, err := s.WithCredentials(s.User(), string(line))
	if err != nil {
		return s, fmt.Errorf("cannot use the password file %s: %w", path, err)
	}
	return withPassword, nil
}
