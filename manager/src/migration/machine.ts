import type { MigrateMode, PeerMessageType } from 'vtpm-proto';

/** Who may run the vTPM after a crash of either end, or a cut of the line, in a state. */
export type Afterwards =
  /** Nothing has stopped: the source runs on. */
  | 'source'
  /** It is frozen until the destination has said what it decided, which is then for ever. */
  | 'asked'
  /** It is decided: it lives at the destination. */
  | 'destination'
  /** Decided for the source: it lives there. */
  | 'decided-source';

/** A state of one end, and the one step out of it. */
export interface Step<State extends string> {
  /** What is done there, for people. */
  readonly does: string;
  /** In this order. */
  readonly sends: readonly PeerMessageType[];
  readonly receives: readonly PeerMessageType[];
  /** Written and counted before the next state, with a point before and one after it where a crash is tested. */
  readonly durable: readonly (readonly [before: string, after: string])[];
  /** Points of a crash test where nothing is written. */
  readonly points: readonly string[];
  readonly next: readonly State[];
  readonly onFailure: State;
  readonly afterwards: Afterwards;
}

export type SourceAt =
  | 'connecting'
  | 'greeting'
  | 'attesting'
  | 'preparing'
  | 'prepared'
  | 'freezing'
  | 'departing'
  | 'sending'
  | 'deciding'
  | 'committing'
  | 'thawing'
  | 'asking'
  | 'checked'
  | 'committed'
  | 'aborted'
  | 'in-doubt';

/** The source. `checked`, `committed`, `aborted` and `in-doubt` are its ends. */
export const SOURCE: Readonly<Record<SourceAt, Step<SourceAt>>> = {
  connecting: {
    does: 'dials the destination over mutual TLS',
    sends: [],
    receives: [],
    durable: [],
    points: [],
    next: ['greeting'],
    onFailure: 'aborted',
    afterwards: 'source',
  },
  greeting: {
    does: 'says which vTPM is to go, and hears what the destination has for it; checks versions both ways',
    sends: ['HELLO'],
    receives: ['OFFER'],
    durable: [],
    points: [],
    next: ['attesting'],
    onFailure: 'aborted',
    afterwards: 'source',
  },
  attesting: {
    does: "verifies the destination's platform and import key, shows its own platform, wraps the secret",
    sends: ['EVIDENCE', 'SECRET'],
    receives: ['EVIDENCE'],
    durable: [],
    points: [],
    next: ['preparing'],
    onFailure: 'aborted',
    afterwards: 'source',
  },
  preparing: {
    does: 'waits until the destination has unwrapped the secret and its toolstack is ready',
    sends: [],
    receives: ['READY'],
    durable: [],
    points: [],
    next: ['prepared', 'checked'],
    onFailure: 'aborted',
    afterwards: 'source',
  },
  prepared: {
    does: 'in mode VMM waits until the VMM takes the state out',
    sends: [],
    receives: [],
    durable: [],
    points: [],
    next: ['freezing'],
    onFailure: 'aborted',
    afterwards: 'source',
  },
  freezing: {
    does: 'has the worker save and hold every command',
    sends: [],
    receives: [],
    durable: [],
    points: ['migrate.source.freeze', 'migrate.source.frozen'],
    next: ['departing'],
    onFailure: 'thawing',
    afterwards: 'source',
  },
  thawing: {
    does: 'lets the frozen worker go on: nothing of the departure is written',
    sends: [],
    receives: [],
    durable: [],
    points: ['migrate.source.thaw', 'migrate.source.thawed'],
    next: ['aborted'],
    onFailure: 'aborted',
    afterwards: 'source',
  },
  departing: {
    does: 'writes the departure while the toolstack reaps the worker, and waits for both',
    sends: [],
    receives: [],
    durable: [['migrate.source.depart', 'migrate.source.departed']],
    points: ['migrate.source.reaped'],
    next: ['sending'],
    onFailure: 'asking',
    afterwards: 'asked',
  },
  sending: {
    does: 'sends the sealed state',
    sends: ['STATE'],
    receives: [],
    durable: [],
    points: [],
    next: ['deciding'],
    onFailure: 'asking',
    afterwards: 'asked',
  },
  deciding: {
    does: 'waits for the decision, and holds it against what it is waiting for',
    sends: [],
    receives: ['DECISION'],
    durable: [],
    points: [],
    next: ['committing'],
    onFailure: 'asking',
    afterwards: 'asked',
  },
  committing: {
    does: 'writes the tombstone, and says so',
    sends: ['SETTLED'],
    receives: [],
    durable: [['migrate.source.commit', 'migrate.source.committed']],
    points: [],
    next: ['committed'],
    onFailure: 'asking',
    afterwards: 'destination',
  },
  asking: {
    does: 'asks the destination on a new line what it decided, writes that, and says so',
    sends: ['INQUIRE', 'SETTLED'],
    receives: ['DECISION'],
    durable: [
      ['migrate.source.commit', 'migrate.source.committed'],
      ['migrate.source.abort', 'migrate.source.aborted'],
    ],
    points: [],
    next: ['committed', 'aborted', 'in-doubt'],
    onFailure: 'in-doubt',
    afterwards: 'asked',
  },
  checked: end('the dry run is over: the destination forgets it', 'source'),
  committed: end('it lives at the destination', 'destination'),
  aborted: end('it lives here', 'decided-source'),
  'in-doubt': end(
    'asks again and again, after a restart too, and at once when the operator says so',
    'asked',
  ),
};

export type DestinationAt =
  | 'greeting'
  | 'offering'
  | 'attesting'
  | 'unwrapping'
  | 'accepting'
  | 'ready'
  | 'receiving'
  | 'deciding'
  | 'answering'
  | 'settling'
  | 'checked'
  | 'committed'
  | 'ended';

/** The destination. `checked`, `committed` and `ended` are its ends; after `ended` an inquiry is answered ABORT. */
export const DESTINATION: Readonly<Record<DestinationAt, Step<DestinationAt>>> = {
  greeting: {
    does: 'reads which vTPM is to come, and whether it could live here',
    sends: [],
    receives: ['HELLO'],
    durable: [],
    points: [],
    next: ['offering'],
    onFailure: 'ended',
    afterwards: 'source',
  },
  offering: {
    does: 'makes the import key, offers it with a one-time identifier, shows its platform',
    sends: ['OFFER', 'EVIDENCE'],
    receives: [],
    durable: [],
    points: ['migrate.destination.import-key'],
    next: ['attesting'],
    onFailure: 'ended',
    afterwards: 'source',
  },
  attesting: {
    does: "verifies the source's platform, and holds the vTPM's place",
    sends: [],
    receives: ['EVIDENCE'],
    durable: [],
    points: ['migrate.destination.expected'],
    next: ['unwrapping'],
    onFailure: 'ended',
    afterwards: 'source',
  },
  unwrapping: {
    does: 'has its chip unwrap the secret; the import key is gone then',
    sends: [],
    receives: ['SECRET'],
    durable: [],
    points: ['migrate.destination.unwrapped'],
    next: ['accepting'],
    onFailure: 'ended',
    afterwards: 'source',
  },
  accepting: {
    does: 'asks its toolstack, waits for a worker, looks for room on its disk',
    sends: [],
    receives: [],
    durable: [],
    points: ['migrate.destination.incoming', 'migrate.destination.accepted'],
    next: ['ready'],
    onFailure: 'ended',
    afterwards: 'source',
  },
  ready: {
    does: 'proves that it has the keys',
    sends: ['READY'],
    receives: [],
    durable: [],
    points: [],
    next: ['receiving', 'checked'],
    onFailure: 'ended',
    afterwards: 'source',
  },
  receiving: {
    does: 'takes the state, and opens it where it is whole',
    sends: [],
    receives: ['STATE'],
    durable: [],
    points: [],
    next: ['deciding'],
    onFailure: 'ended',
    afterwards: 'asked',
  },
  deciding: {
    does: 'writes the vTPM as its own, once and for all; in mode VMM when its VMM asks for it',
    sends: [],
    receives: [],
    durable: [['migrate.destination.commit', 'migrate.destination.committed']],
    points: [],
    next: ['answering'],
    onFailure: 'ended',
    afterwards: 'asked',
  },
  answering: {
    does: 'signs what it decided and says so',
    sends: ['DECISION'],
    receives: [],
    durable: [],
    points: [],
    next: ['settling'],
    onFailure: 'committed',
    afterwards: 'destination',
  },
  settling: {
    does: "waits for the source's tombstone, and forgets the migration then",
    sends: [],
    receives: ['SETTLED'],
    durable: [['migrate.destination.settle', 'migrate.destination.settled']],
    points: [],
    next: ['committed'],
    onFailure: 'committed',
    afterwards: 'destination',
  },
  checked: end('the dry run is over', 'source'),
  committed: end('it lives here', 'destination'),
  ended: end('nothing is decided; whoever asks is answered ABORT', 'asked'),
};

/** What answers an inquiry, in a session of its own. */
export const INQUIRED: Step<'answered'> = {
  does: 'ends the live session, decides ABORT where nothing was decided, and says what was',
  sends: ['DECISION'],
  receives: ['INQUIRE', 'SETTLED'],
  durable: [
    ['migrate.destination.abort', 'migrate.destination.aborted'],
    ['migrate.destination.settle', 'migrate.destination.settled'],
  ],
  points: [],
  next: ['answered'],
  onFailure: 'answered',
  afterwards: 'asked',
};

/** A point where a crash is tested. The tests of crashes are made from these. */
export interface CrashPoint {
  readonly name: string;
  readonly side: 'source' | 'destination';
  readonly state: string;
  readonly isDurable: boolean;
  readonly afterwards: Afterwards;
  readonly modes: readonly MigrateMode[];
}

const ALL: readonly MigrateMode[] = ['OFFLINE', 'LIVE', 'VMM'];

/** Every point of an undisturbed migration, then those of an inquiry, each once. */
export const MIGRATION_BARRIERS: readonly CrashPoint[] = [
  ...Object.entries(SOURCE).flatMap(([state, step]) => pointsOf('source', state, step)),
  ...Object.entries(DESTINATION).flatMap(([state, step]) => pointsOf('destination', state, step)),
  ...pointsOf('destination', 'inquired', INQUIRED),
].filter(({ name }, i, all) => all.findIndex((other) => other.name === name) === i);

function pointsOf(side: 'source' | 'destination', state: string, step: Step<string>): CrashPoint[] {
  const point = (name: string, isDurable: boolean): CrashPoint => ({
    name,
    side,
    state,
    isDurable,
    afterwards: step.afterwards,
    modes: ALL,
  });
  return [
    ...step.sends.flatMap((type) => [`send.${type}`, `sent.${type}`]),
    ...step.receives.map((type) => `received.${type}`),
  ]
    .map((name) => point(`migrate.${side}.${name}`, false))
    .concat(step.durable.flatMap((pair) => pair.map((name) => point(name, true))))
    .concat(step.points.map((name) => point(name, false)));
}

function end(does: string, afterwards: Afterwards): Step<never> {
  return {
    does,
    sends: [],
    receives: [],
    durable: [],
    points: [],
    next: [],
    onFailure: undefined as never,
    afterwards,
  };
}
