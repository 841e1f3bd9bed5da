import assert from 'node:assert/strict';
import fc from 'fast-check';
import { addressText, parseAddress, parseAddresses } from 'vtpm-manager/peer/address';
import { refused } from './ownership-fixture.js';

describe('the address of a host', () => {
  it('is HOST:PORT, and an IPv6 address stands in brackets', () => {
    const host = fc.oneof(fc.ipV4(), fc.ipV6(), fc.domain());
    fc.assert(
      fc.property(host, fc.integer({ min: 1, max: 65_535 }), (each, port) => {
        const text = each.includes(':') ? `[${each}]:${port}` : `${each}:${port}`;
        assert.deepEqual(parseAddress(text), { host: each, port });
        assert.equal(addressText({ host: each, port }), text);
      }),
    );
    assert.deepEqual(parseAddress('[fe80::1%eth0]:7799'), { host: 'fe80::1%eth0', port: 7799 });
  });

  it('is refused where it is anything else', () => {
    for (const text of [
      ...[
        '',
        ':',
        '192.0.2.7',
        '192.0.2.7:',
        '192.0.2.7:0',
        '192.0.2.7:65536',
        '192.0.2.7:x',
        '192.0.2.7:1:2',
      ],
      ...['::1:7799', '[::1]', '[192.0.2.7]:1', '[b.example]:1', '[]:1', '192.0.2:1', '999.1.1.1:1'],
      ...['a b:1', '-a:1', 'a..b:1', 'a/b:1', 'http://b:1', 'b:1\n', ' b:1', 'é:1', `${'a'.repeat(64)}:1`],
    ]) {
      assert.throws(() => parseAddress(text), refused('bad-request'), JSON.stringify(text));
    }
    fc.assert(
      fc.property(fc.string(), (text) => {
        try {
          const { port } = parseAddress(text);
          assert.ok(port >= 1 && port <= 65_535);
        } catch (error) {
          refused('bad-request')(error);
        }
      }),
    );
  });

  it('may be several in a setting, or none', () => {
    assert.deepEqual(parseAddresses(''), []);
    assert.deepEqual(parseAddresses('127.0.0.1:1, [::1]:2'), [
      { host: '127.0.0.1', port: 1 },
      { host: '::1', port: 2 },
    ]);
    assert.throws(() => parseAddresses('127.0.0.1:1,b'), refused('bad-request'));
  });
});
